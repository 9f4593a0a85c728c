"""Sequences that lie one after another attend as each does alone, whatever their neighbours' lengths."""

import pytest
import torch
from torch.testing import assert_close

from veneer_vlm import attention
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


@pytest.mark.parametrize("lengths", [[33], [31, 31, 64], [1, 5]])
def test_in_bfloat16_lengths_are_padded_to_few_which_changes_nothing(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    exact = [torch.randn(sum(lengths), heads, 8, generator=draw).requires_grad_() for heads in (4, 2, 2)]
    packed = [each.detach().bfloat16().requires_grad_() for each in exact]
    up = torch.randn(sum(lengths), 4, 8, generator=draw)
    plain = PackedAttention(lengths)(0, *exact)
    seen = []
    attend = attention.attend

    def noting(*parts: torch.Tensor, sequences: int, **options: bool) -> torch.Tensor:
        seen.append(len(parts[0]) // sequences)
        return attend(*parts, sequences=sequences, **options)

    monkeypatch.setattr(attention, "attend", noting)
    padded = PackedAttention(lengths)(0, *packed)
    assert {each % 32 for each in seen} == {0}
    assert_close(padded.float(), plain, atol=3e-2, rtol=3e-2)
    gradients = torch.autograd.grad(padded, packed, up.bfloat16())
    for gradient, plain_gradient in zip(gradients, torch.autograd.grad(plain, exact, up), strict=True):
        assert_close(gradient.float(), plain_gradient, atol=6e-2, rtol=3e-2)
