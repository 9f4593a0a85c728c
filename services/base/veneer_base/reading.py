"""The forward pass of training: the arithmetic of transformers' Qwen3-VL, with nothing paid for twice.

Owns patches, the tower's pass and the decoder's for batches of equal pictures. A picture's questions share its
visual prefix: each sees the prefix and itself, at the positions it would have alone. Weights stay in the library's
model.

Shapes: B pictures, N patches, M = N / 4 visual tokens, D hidden, L tokens.
"""

import dataclasses
import functools
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl as library

from veneer_base.shape import MERGE, PATCH_PX

CELL_PX = PATCH_PX * MERGE
PREFIX_BEFORE = 4  # <|im_start|> user \n <|vision_start|>


@dataclasses.dataclass(frozen=True)
class Grid:
    """A picture's size in visual tokens."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """How many visual tokens it makes."""
        return self.rows * self.columns


def patches(pictures_B_H_W_3: np.ndarray) -> Tensor:
    """uint8 pictures as patches [B, N, 768] in the processor's order: blocks of 2x2, then channel, row, column.

    The processor repeats each patch for a second moment in time; here the tower's weights are summed over time instead.
    """
    B, H, W, _ = pictures_B_H_W_3.shape
    x = torch.from_numpy(pictures_B_H_W_3).float().div_(127.5).sub_(1)
    x = x.view(B, H // CELL_PX, MERGE, PATCH_PX, W // CELL_PX, MERGE, PATCH_PX, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x.reshape(B, -1, 3 * PATCH_PX**2)


def see(model: Qwen3VLForConditionalGeneration, patches_B_N_P: Tensor, grid: Grid) -> tuple[Tensor, list[Tensor]]:
    """The tower: visual tokens [B, M, D], and the deepstack tensors of the same shape."""
    tower = model.model.visual
    B, N, _ = patches_B_N_P.shape
    indices, weights, positions = _places(
        tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners, grid
    )
    projection = tower.patch_embed.proj
    x = F.linear(patches_B_N_P, projection.weight.sum(2).flatten(1), projection.bias)
    x = x + (tower.pos_embed(indices) * weights.unsqueeze(-1)).sum(0 if weights.shape[0] == 4 else 1)
    cos, sin = (t[None, None] for t in tower.rotary_pos_emb(x, positions))
    heads = tower.config.num_heads
    taps: list[Tensor] = []
    for i, block in enumerate(tower.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).view(B, N, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
        x = x + block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, -1))
        x = x + block.mlp(block.norm2(x))
        if i in tower.deepstack_visual_indexes:
            taps.append(tower.deepstack_merger_list[len(taps)](x).view(B, N // MERGE**2, -1))
    return tower.merger(x).view(B, N // MERGE**2, -1), taps


def read(
    model: Qwen3VLForConditionalGeneration,
    ids_B_L: Tensor,
    segments_B_L: Tensor,
    visual_B_M_D: Tensor,
    taps: list[Tensor],
    grid: Grid,
) -> Tensor:
    """The decoder's states [B, L, D].

    Args:
        model: whose decoder reads.
        ids_B_L: compact token ids, the picture's M pads from `PREFIX_BEFORE` on.
        segments_B_L: 0 for the prefix, 1, 2, ... for the questions, -1 for padding.
        visual_B_M_D: the pictures' tokens.
        taps: what deepstack adds to them in the first layers.
        grid: how the pictures' tokens lie.
    """
    decoder = model.model.language_model
    B, L = ids_B_L.shape
    before, after = PREFIX_BEFORE, PREFIX_BEFORE + grid.tokens
    x = decoder.embed_tokens(ids_B_L)
    x = torch.cat([x[:, :before], visual_B_M_D, x[:, after:]], 1)
    cos, sin = (t.unsqueeze(1) for t in decoder.rotary_emb(x, text_positions(segments_B_L, grid)))
    visible = visibility(segments_B_L)
    for i, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        h = _rms(layer.input_layernorm, x)
        q = _rms(attention.q_norm, attention.q_proj(h).view(B, L, -1, attention.head_dim)).transpose(1, 2)
        k = _rms(attention.k_norm, attention.k_proj(h).view(B, L, -1, attention.head_dim)).transpose(1, 2)
        v = attention.v_proj(h).view(B, L, -1, attention.head_dim).transpose(1, 2)
        q, k = q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
        k, v = (t.repeat_interleave(attention.num_key_value_groups, 1) for t in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + attention.o_proj(seen.transpose(1, 2).reshape(B, L, -1))
        h = _rms(layer.post_attention_layernorm, x)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
        if i < len(taps):
            x = torch.cat([x[:, :before], x[:, before:after] + taps[i], x[:, after:]], 1)
    return _rms(decoder.norm, x)


def visibility(segments_B_L: Tensor) -> Tensor:
    """Which token sees which, [B, 1, L, L]: the prefix and its own segment, up to itself."""
    L = segments_B_L.shape[1]
    same = (segments_B_L[:, None] == segments_B_L[:, :, None]) | (segments_B_L[:, None] == 0)
    return (same & torch.ones(L, L, dtype=torch.bool).tril())[:, None]


def text_positions(segments_B_L: Tensor, grid: Grid) -> Tensor:
    """Rotary positions [3, B, L] (time, row, column): a question goes on where the prefix ends, as if it were alone."""
    B, L = segments_B_L.shape
    before, after = PREFIX_BEFORE, PREFIX_BEFORE + grid.tokens
    in_prefix = (segments_B_L == 0).sum(1, keepdim=True)
    index_B_L = torch.arange(L).expand(B, L)
    starts = torch.cat([torch.zeros(B, 1, dtype=torch.bool), segments_B_L[:, 1:] != segments_B_L[:, :-1]], 1)
    segment_start = torch.where(starts, index_B_L, 0).cummax(1).values
    shrunk = grid.tokens - max(grid.rows, grid.columns)  # a picture takes as many positions as its longer side
    one = torch.where(segments_B_L == 0, index_B_L, in_prefix + index_B_L - segment_start) - shrunk
    one[:, :before] = torch.arange(before)
    positions = one.expand(3, B, L).clone()
    cell = torch.arange(grid.tokens)
    positions[0, :, before:after] = before
    positions[1, :, before:after] = before + cell // grid.columns
    positions[2, :, before:after] = before + cell % grid.columns
    return positions


def _rms(norm: torch.nn.Module, x: Tensor) -> Tensor:
    weight, epsilon = cast(Tensor, norm.weight), cast(float, norm.variance_epsilon)
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


@functools.lru_cache(maxsize=64)
def _places(side: int, mode: str, align_corners: bool, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Position-embedding indices and weights, and rotary positions, of a picture's patches, as in the library."""
    thw = torch.tensor([[1, grid.rows * MERGE, grid.columns * MERGE]])
    indices, weights = library.get_vision_interpolation_indices_and_weights(  # type: ignore[attr-defined]
        thw, num_grid_per_side=side, mode=mode, align_corners=align_corners, spatial_merge_size=MERGE, kwargs={}
    )
    turns = library.get_vision_position_ids(thw, MERGE, kwargs={})  # type: ignore[attr-defined]
    return indices, weights, turns
