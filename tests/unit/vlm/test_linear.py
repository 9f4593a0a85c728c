"""A product is F.linear's, however it is computed, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from veneer_vlm import linear


@pytest.fixture(params=["every weight is large", "and a head's", "no weight is"])
def _large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LARGE", 1 << 60 if request.param == "no weight is" else 0)
    if request.param == "and a head's":
        monkeypatch.setattr(linear, "_TALL", 0)


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_the_linears(rows: int, biased: bool, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(rows, 160, generator=draw).to(dtype)
    weight, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in ((96, 80), (96,)))
    up = torch.randn(rows, 96, generator=draw).to(dtype)
    ours, theirs = (wide.clone().requires_grad_() for _ in range(2))
    chosen = bias if biased else None
    product = linear.product(ours[:, ::2], weight, chosen)  # every second: not contiguous
    expected = F.linear(theirs[:, ::2], weight, chosen)
    assert_close(product, expected)
    assert_close(torch.autograd.grad(product, ours, up), torch.autograd.grad(expected, theirs, up))
    with torch.inference_mode():
        assert_close(linear.product(wide[:, ::2], weight, chosen), expected.detach())


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_a_weight_of_fewer_bits_is_as_good(rows: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_AT_ONCE", 7)  # of 96 outputs and 80 inputs
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(rows, 80, generator=draw)
    weight = torch.randn(96, 80, generator=draw).bfloat16()
    bias = torch.randn(96, generator=draw) if biased else None
    up = torch.randn(rows, 96, generator=draw)
    ours, theirs = (given.clone().requires_grad_() for _ in range(2))
    product, expected = linear.product(ours, weight, bias), F.linear(theirs, weight.float(), bias)
    assert_close(product, expected)
    assert_close(torch.autograd.grad(product, ours, up), torch.autograd.grad(expected, theirs, up))


def test_large_float32_goes_another_way_than_small(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(linear._Product, "apply", lambda *arguments: seen.append(arguments[1].shape))
    for outputs in (1023, 1024):
        linear.product(torch.ones(2, 1024), torch.ones(outputs, 1024))
    linear.product(torch.ones(2, 1024).bfloat16(), torch.ones(1024, 1024).bfloat16())
    assert seen == ([(1024, 1024)] if linear._ONEDNN else [])
