"""A product is F.linear's, however it is computed, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from veneer_vlm import linear, native


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


@pytest.fixture(params=[True, False], ids=["library", "pieces"])
def by_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not native.MULTIPLIES[torch.float32]:
        pytest.skip("needs the compiled library of AVX2, on a CPU without AVX-512")
    monkeypatch.setitem(native.MULTIPLIES, torch.float32, request.param)
    return bool(request.param)


@pytest.mark.usefixtures("_large", "by_library")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(96, 80), (16, 16), (48, 1104), (1104, 48)])  # whole panels, rests, three helpings
@pytest.mark.parametrize("rows", [0, 1, 5, 37, 518])
def test_a_weight_of_fewer_bits_is_as_good(
    rows: int, shape: tuple[int, int], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_AT_ONCE", 7)  # no whole part of any shape
    draw = torch.Generator().manual_seed(0)
    outputs, inputs = shape
    given = torch.randn(rows, inputs, generator=draw)
    weight = torch.randn(outputs, inputs, generator=draw).bfloat16()
    bias = torch.randn(outputs, generator=draw) if biased else None
    up = torch.randn(rows, outputs, generator=draw)
    ours, theirs = (given.clone().requires_grad_() for _ in range(2))
    product, expected = linear.product(ours, weight, bias), F.linear(theirs, weight.float(), bias)
    near = {"rtol": 1e-5, "atol": 1e-4} if max(shape) > 100 else {}  # sums of so many are rounded more often
    assert_close(product, expected, **near)
    assert_close(torch.autograd.grad(product, ours, up), torch.autograd.grad(expected, theirs, up), **near)


@pytest.mark.parametrize("by_library", [True], indirect=True)
def test_what_a_token_gets_by_the_library_depends_on_no_other_one(by_library: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    given, weight = torch.randn(520, 1104, generator=draw), torch.randn(160, 1104, generator=draw).bfloat16()
    together = linear.product(given, weight)
    assert all(torch.equal(together[:rows], linear.product(given[:rows], weight)) for rows in [*range(1, 14), 519])
    given[3] = torch.nan
    after = linear.product(given, weight)
    assert after[3].isnan().all()
    assert torch.equal(after[:3], together[:3])
    assert torch.equal(after[4:], together[4:])


@pytest.mark.parametrize("by_library", [True], indirect=True)
def test_the_library_multiplies_float32_by_weights_in_bfloat16_alone(by_library: bool) -> None:
    weight = torch.ones(64, 80)
    assert native.multiplies(weight.bfloat16(), torch.float32)
    assert not native.multiplies(weight.bfloat16()[:, :72], torch.float32)
    for dtype in (None, torch.float32, torch.bfloat16):
        assert not native.multiplies(weight, dtype)


@pytest.mark.parametrize("by_library", [True], indirect=True)
def test_what_does_not_fit_a_weight_is_refused(by_library: bool) -> None:
    weight = torch.ones(64, 80).bfloat16()
    for given, inputs, turned in ((torch.ones(2, 64), 80, False), (torch.ones(2, 80), 64, True)):
        with pytest.raises(ValueError, match=f"not {inputs} groups"):
            native.product_stored(given, weight, turned=turned)


def test_large_float32_goes_another_way_than_small(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(linear._Product, "apply", lambda *arguments: seen.append(arguments[1].shape))
    for outputs in (1023, 1024):
        linear.product(torch.ones(2, 1024), torch.ones(outputs, 1024))
    linear.product(torch.ones(2, 1024).bfloat16(), torch.ones(1024, 1024).bfloat16())
    assert seen == ([(1024, 1024)] if linear._ONEDNN else [])
