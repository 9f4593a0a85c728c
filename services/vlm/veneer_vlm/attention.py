"""How tokens of the decoder attend to one another: the seam to whoever batches sequences.

Owns the protocol and the attention of whole packed sequences, which keeps nothing: training, scoring, prefill
at one go. Attention over remembered tokens is `cache`'s.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """Called once a layer with the pass's rotated queries and keys."""

    def __call__(self, layer: int, query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor) -> Tensor:
        """What each token gathers, (T, H, K)."""
        ...


class PackedAttention:
    """Causal attention within each of several sequences that lie one after another; gradients flow.

    Args:
        lengths: tokens of each sequence; their sum is T.
        causal: False lets every token see its whole sequence (patches of a picture).
    """

    def __init__(self, lengths: Sequence[int], *, causal: bool = True) -> None:
        self.bounds = list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))
        self.causal = causal

    def __call__(self, layer: int, query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor) -> Tensor:
        """See `Attention`."""
        gathered = [
            attend(query_T_H_K[a:b], key_T_G_K[a:b], value_T_G_K[a:b], causal=self.causal) for a, b in self.bounds
        ]
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered)

    def rows(self, start: int, stop: int, query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor) -> Tensor:
        """What tokens `start` to `stop` gather, (stop - start, H, K), of all that they see.

        Raises:
            ValueError: causal, and the tokens are not all.
        """
        if (start, stop) == (0, len(query_T_H_K)):
            return self(0, query_T_H_K, key_T_G_K, value_T_G_K)
        if self.causal:
            raise ValueError("rows of a causal pass cannot be gathered apart")
        gathered = [
            attend(query_T_H_K[max(a, start) : min(b, stop)], key_T_G_K[a:b], value_T_G_K[a:b])
            for a, b in self.bounds
            if max(a, start) < min(b, stop)
        ]
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered)

    def seen(self, start: int, stop: int) -> int:
        """How many tokens those from `start` to `stop` see, all together, where each sees its whole sequence."""
        return sum(max(0, min(b, stop) - max(a, start)) * (b - a) for a, b in self.bounds)


def attend(
    query_T_H_K: Tensor,
    key_C_G_K: Tensor,
    value_C_G_K: Tensor,
    *,
    causal: bool = False,
    mask_T_C: Tensor | None = None,
) -> Tensor:
    """Attention of one sequence, (T, H, K); query head h reads key/value head h // (H / G).

    Args:
        query_T_H_K: rotated queries.
        key_C_G_K: rotated keys of all C tokens that may be seen.
        value_C_G_K: their values.
        causal: token t sees 0..t only; needs T = C.
        mask_T_C: what may be seen, where it is neither everything nor causal.
    """
    tokens, heads, width = query_T_H_K.shape
    groups = key_C_G_K.shape[1]
    key, value = key_C_G_K.transpose(0, 1)[None], value_C_G_K.transpose(0, 1)[None]
    if tokens == 1:
        # One token sees everything, so heads that share keys may stand as rows: the keys are then read once a
        # group.
        query = query_T_H_K.view(1, groups, heads // groups, width)
        return F.scaled_dot_product_attention(query, key, value).reshape(1, heads, width)
    query = query_T_H_K.transpose(0, 1)[None]
    gathered = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask_T_C, is_causal=causal, enable_gqa=groups != heads
    )
    return gathered[0].transpose(0, 1)
