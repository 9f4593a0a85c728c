"""Rotary positions of decoder and vision tower.

Owns angles and rotation. Angles are computed in float32 whatever the model's dtype (RoPE:
https://arxiv.org/abs/2104.09864).
"""

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]


def _frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """`width` / 2 inverse wavelengths, from 1 down to almost 1 / theta."""
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def text_rotation(
    positions_3_T: Tensor, head_dim: int, theta: float, section: tuple[int, int, int], dtype: torch.dtype
) -> Rotation:
    """Interleaved multimodal rotation: cosine and sine, (T, 1, K) each.

    Frequency i turns with the time axis, but frequencies 1, 4, 7, ... with the row and 2, 5, 8, ... with the
    column, as many of them as `section` grants the axis, so that every axis has both fast and slow ones
    (Qwen3-VL technical report, https://arxiv.org/abs/2511.21631, "interleaved MRoPE").
    """
    frequencies = _frequencies(head_dim, theta, positions_3_T.device)
    axis = torch.zeros(head_dim // 2, dtype=torch.long, device=positions_3_T.device)
    for place in (1, 2):
        axis[place : 3 * section[place] : 3] = place
    angles = positions_3_T.float()[axis].T * frequencies
    return _cosine_sine(angles, dtype)


def vision_rotation(rows_P: Tensor, columns_P: Tensor, head_dim: int, theta: float) -> Rotation:
    """Axial rotation in float32: cosine and sine, (P, 1, K) each; the row's angles come first."""
    frequencies = _frequencies(head_dim // 2, theta, rows_P.device)
    angles = torch.cat((rows_P[:, None] * frequencies, columns_P[:, None] * frequencies), dim=-1)
    return _cosine_sine(angles, torch.float32)


def _cosine_sine(angles: Tensor, dtype: torch.dtype) -> Rotation:
    sine = angles.sin()
    whole = torch.cat((angles.cos(),) * 2, dim=-1), torch.cat((-sine, sine), dim=-1)
    return whole[0][:, None].to(dtype), whole[1][:, None].to(dtype)


def rotate(heads_T_H_K: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (i, i + K / 2) of every head by its token's angle, in the wider of the two dtypes."""
    cosine, sine = rotation
    turned = heads_T_H_K.roll(heads_T_H_K.shape[-1] // 2, -1)
    return (heads_T_H_K * cosine + turned * sine).to(heads_T_H_K.dtype)
