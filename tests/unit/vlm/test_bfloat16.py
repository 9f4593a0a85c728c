"""Packed weights of bfloat16 give the products of those that are not, for any number of tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from veneer_vlm.bfloat16 import PackedKernel

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no products of bfloat16 on this CPU"
)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 8, 65])
def test_a_product_is_that_of_the_weight_as_it_was(biased: bool, tokens: int) -> None:
    weight = numbers(96, 80, seed=1)
    bias = numbers(96, seed=3) if biased else None
    kernel = PackedKernel(weight, bias)
    wide = numbers(tokens, 160, seed=2)
    for given in (wide[:, :80].contiguous(), wide[:, ::2]):  # the second is not contiguous
        right = F.linear(given.float(), weight.float(), None if bias is None else bias.float())
        assert_close(kernel(given), right.bfloat16(), rtol=1e-2, atol=4e-3)
