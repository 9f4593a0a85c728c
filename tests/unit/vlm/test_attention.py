"""Sequences that lie one after another attend as each does alone, whatever their neighbours' lengths."""

import pytest
import torch
from torch.testing import assert_close

from veneer_vlm.attention import PackedAttention


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [1, 1, 4, 4, 2, 1], [2, 7, 2]])
def test_packed_sequences_are_those_alone(lengths: list[int], causal: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    packed = [torch.randn(tokens, heads, 8, generator=draw).requires_grad_() for heads in (4, 2, 2)]
    up = torch.randn(tokens, 4, 8, generator=draw)
    together = PackedAttention(lengths, causal=causal)(0, *packed)
    alone = torch.cat(
        [
            PackedAttention([length], causal=causal)(0, *parts)
            for length, *parts in zip(lengths, *(torch.split(each, lengths) for each in packed), strict=True)
        ]
    )
    assert_close(together, alone)
    assert_close(torch.autograd.grad(together, packed, up), torch.autograd.grad(alone, packed, up))
