"""Packed weights of bfloat16 give the products of those that are not, for any number of tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from veneer_vlm import native
from veneer_vlm.bfloat16 import PackedKernel

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no products of bfloat16 on this CPU"
)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(params=[True, False], ids=["library", "oneDNN"])
def by_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not native.MULTIPLIES[torch.bfloat16]:
        pytest.skip("needs the compiled library, and a CPU with products of bfloat16 and without AMX")
    monkeypatch.setitem(native.MULTIPLIES, torch.bfloat16, request.param)
    return bool(request.param)


@pytest.mark.usefixtures("by_library")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("outputs", [96, 104, 112, 128])
@pytest.mark.parametrize("tokens", [*range(9), 13, 65])
def test_a_product_is_that_of_the_weight_as_it_was(biased: bool, outputs: int, tokens: int) -> None:
    weight = numbers(outputs, 80, seed=1)
    bias = numbers(outputs, seed=3) if biased else None
    kernel = PackedKernel(weight, bias)
    wide = numbers(tokens, 175, seed=2)
    for given in (wide[:, :80].contiguous(), wide[:, :80], wide[:, ::2][:, :80]):  # the others are not contiguous
        right = F.linear(given.float(), weight.float(), None if bias is None else bias.float())
        assert_close(kernel(given), right.bfloat16(), rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize("by_library", [True], indirect=True)
def test_what_a_token_gets_depends_on_no_other_one(by_library: bool) -> None:
    kernel, given = PackedKernel(numbers(160, 96, seed=1), None), numbers(70, 96, seed=2)
    together = kernel(given)
    assert all(torch.equal(together[:tokens], kernel(given[:tokens])) for tokens in range(1, 20))
    given[3] = torch.nan
    after = kernel(given)
    assert after[3].isnan().all()
    assert torch.equal(after[:3], together[:3])
    assert torch.equal(after[4:], together[4:])


@pytest.mark.parametrize("by_library", [True], indirect=True)
@pytest.mark.parametrize("given", [torch.ones(2, 80), torch.ones(2, 96).bfloat16()])
def test_what_does_not_fit_a_weight_is_refused(by_library: bool, given: torch.Tensor) -> None:
    weight = numbers(64, 80, seed=1)
    for product in (PackedKernel(weight, None), lambda rows: native.product_stored(rows, weight)):
        with pytest.raises(ValueError, match="not 40 groups"):
            product(given)


@pytest.mark.parametrize("by_library", [True], indirect=True)
@pytest.mark.parametrize("shape", [(16, 16), (96, 80), (112, 4112), (4112, 48)])  # whole tiles, rests, two helpings
@pytest.mark.parametrize("tokens", [0, 1, 7, 9, 530])
def test_products_with_a_weight_as_it_is_stored(by_library: bool, shape: tuple[int, int], tokens: int) -> None:
    weight, bias = numbers(*shape, seed=1), numbers(shape[0], seed=3)
    given, up = (numbers(tokens, width, seed=2) for width in reversed(shape))
    right = F.linear(given.float(), weight.float(), bias.float())
    assert_close(native.product_stored(given, weight, bias), right.bfloat16(), rtol=1e-2, atol=4e-2)
    right = up.float() @ weight.float()
    assert_close(native.product_stored(up, weight, turned=True), right.bfloat16(), rtol=1e-2, atol=4e-2)
    together = native.product_stored(given, weight)
    assert torch.equal(together[:3], native.product_stored(given[:3], weight))
