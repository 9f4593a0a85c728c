"""Norm and gate by the compiled library: torch's numbers and gradients, of tensors that lie anyhow."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from veneer_vlm import native
from veneer_vlm.pointwise import cross_entropy, rms_norm, swiglu

pytestmark = pytest.mark.skipif(
    not native.AVAILABLE, reason="the library is for AVX2 and AVX-512, and compiled where a compiler is at hand"
)
BITS = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_torch(monkeypatch: pytest.MonkeyPatch, values: Tensor, grad: Tensor, *, norm: bool) -> tuple[Tensor, Tensor]:
    """In float64, whose dtype the library does not take."""
    wide = values.detach().double().requires_grad_()
    weight = numbers(3, wide.shape[-1], dtype=values.dtype).double()
    right = rms_norm(wide, weight, 1e-6) if norm else swiglu(wide)
    right.backward(grad.double())
    assert wide.grad is not None
    return right.detach(), wide.grad


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (3, 4, 128), (7, 2, 2064)])
@pytest.mark.parametrize("apart", [True, False])
def test_a_norm_and_its_gradient(
    dtype: torch.dtype, shape: tuple[int, ...], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = (
        numbers(1, *shape[:-1], 2 * shape[-1], dtype=dtype)[..., : shape[-1]] if apart else numbers(1, *shape).to(dtype)
    )
    values = values.detach().requires_grad_()
    weight = numbers(3, shape[-1], dtype=dtype)
    grad = numbers(2, *shape, dtype=dtype)
    monkeypatch.setattr(F, "rms_norm", lambda *_: pytest.fail("torch did it"))
    normed = rms_norm(values, weight, 1e-6)
    normed.backward(grad)
    monkeypatch.undo()
    right, right_grad = by_torch(monkeypatch, values, grad, norm=True)
    assert normed.is_contiguous()
    assert_close(normed.detach().double(), right, **BITS[dtype])
    assert values.grad is not None
    assert_close(values.grad.double(), right_grad, **BITS[dtype])
    with torch.no_grad():
        assert torch.equal(rms_norm(values, weight, 1e-6), normed)


def test_a_norm_whose_weight_learns_is_torchs() -> None:
    values, weight = numbers(1, 3, 16).requires_grad_(), numbers(2, 16).requires_grad_()
    rms_norm(values, weight, 1e-6).sum().backward()
    assert weight.grad is not None
    assert weight.grad.any()


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 48), (3, 2064), (4, 6144)])
def test_a_gate_and_its_gradient(dtype: torch.dtype, tokens: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = numbers(1, tokens, 2 * width).mul_(3)
    values[0, :8] = torch.tensor([0.0, -0.0, 90, -90, 200, -200, 1e-8, -1e-8])  # gates that are shut, and wide open
    values = values.to(dtype).requires_grad_()
    grad = numbers(2, tokens, width, dtype=dtype)
    monkeypatch.setattr(F, "silu", lambda *_: pytest.fail("torch did it"))
    gated = swiglu(values)
    gated.backward(grad)
    monkeypatch.undo()
    right, right_grad = by_torch(monkeypatch, values, grad, norm=False)
    assert_close(gated.detach().double(), right, **BITS[dtype])
    assert values.grad is not None
    assert_close(values.grad.double(), right_grad, **BITS[dtype])
    with torch.no_grad():
        assert torch.equal(swiglu(values), gated)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_went_astray_stays_so_in_its_row(number: float) -> None:
    for of, width in ((lambda x: rms_norm(x, torch.ones(32), 1e-6), 32), (swiglu, 16)):
        values = numbers(1, 2, 32)
        right = of(values)
        values[0, 20] = number
        found = of(values)
        assert not found[0].isfinite().all()
        assert found.shape == (2, width)
        assert torch.equal(found[1], right[1])


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize(("tokens", "ids"), [(0, 16), (1, 16), (5, 48), (3, 2064), (2, 151_936)])
def test_a_loss_and_its_gradient(dtype: torch.dtype, tokens: int, ids: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = numbers(1, tokens, ids).mul_(4)
    values[:1] += torch.linspace(-500, 500, ids)  # one of them takes all
    values = values.to(dtype)
    targets = torch.randint(ids, (tokens,), generator=torch.Generator().manual_seed(2))
    wide = values.double().requires_grad_()
    right = F.cross_entropy(wide, targets, reduction="none")
    right.sum().backward()
    monkeypatch.setattr(F, "cross_entropy", lambda *_: pytest.fail("torch did it"))
    assert_close(cross_entropy(values.clone(), targets).double(), right.detach(), rtol=1e-5, atol=1e-4)
    logits = values.clone().requires_grad_()
    losses = cross_entropy(logits * 1, targets)
    assert losses.dtype is torch.float32
    assert_close(losses.detach().double(), right.detach(), rtol=1e-5, atol=1e-4)
    (grad,) = torch.autograd.grad((losses * 2).sum(), logits)
    assert wide.grad is not None
    assert_close(grad.double(), 2 * wide.grad, **BITS[dtype])


def test_a_target_that_is_no_id_is_refused() -> None:
    for target in (-1, 16):
        with pytest.raises(IndexError, match="between 0 and 15"):
            cross_entropy(numbers(1, 1, 16), torch.tensor([target]))
