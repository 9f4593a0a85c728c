"""Eight bits: the arithmetic, its independence of neighbours, and the model around it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from veneer_vlm import int8, native
from veneer_vlm.int8 import Int8Kernel, quantise, quantised, quantised_weight
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig
from veneer_vlm.loss import token_losses
from veneer_vlm.weights import load

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Row, Toy

BOUND = 0.05


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["FBGEMM", "oneDNN", "library"])
def _by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "library":
        if not native.MULTIPLIES[torch.int8]:
            pytest.skip("needs the compiled library, and a CPU with VNNI and without AMX")
        return
    monkeypatch.setitem(native.MULTIPLIES, torch.int8, False)
    if request.param == "oneDNN":
        monkeypatch.setattr(int8, "_has_fbgemm", lambda: False)
    elif not (int8.SATURATES and int8._has_fbgemm()):
        pytest.skip("FBGEMM multiplies eight bits on x86 with AVX2 and without VNNI")


@pytest.mark.usefixtures("_by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 8, 65])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [96, 112, 128])
def test_a_product_is_that_of_integers(dtype: torch.dtype, tokens: int, bias: bool, outputs: int) -> None:
    weight, given = numbers(outputs, 64), numbers(tokens, 64, seed=2) * torch.logspace(-3, 3, tokens)[:, None]
    given = given.to(dtype)
    offset = numbers(outputs, seed=3) if bias else None
    left, left_scale, middle = quantised(given)
    right, right_scale = quantised_weight(weight)
    products = (left.long() @ right.long().T).double() * left_scale + right.sum(-1).double() * middle
    reference = products * right_scale.T + (offset if bias else 0)
    found = Int8Kernel(weight, offset)(given)
    assert found.dtype == dtype
    rounded = 2**-8 * reference.abs() if dtype == torch.bfloat16 else 0
    assert ((found.double() - reference).abs() <= 1e-6 * reference.abs().amax(-1, keepdim=True) + rounded).all()
    exact = given.float() @ weight.T + (offset if bias else 0)
    assert (found.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.usefixtures("_by")
def test_a_product_of_no_tokens_is_empty() -> None:
    assert Int8Kernel(numbers(96, 64), None)(numbers(0, 64)).shape == (0, 96)


@pytest.mark.usefixtures("_by")
@pytest.mark.parametrize("inputs", [64, 67, 256])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_greatest_sums_there_are_do_not_saturate(sign: int, inputs: int) -> None:
    """Activations are all as great as can be but for one; which weights are neighbours is another thing in each row."""
    weight = sign * numbers(16, inputs).abs() ** 3
    weight[0] = sign
    weight[1] = sign * (torch.arange(inputs) % 2)
    given = torch.ones(9, inputs)
    given[:, -1] = 0
    integers, scale = quantised_weight(weight)
    expected = integers[:, :-1].sum(-1) * scale[:, 0]
    torch.testing.assert_close(Int8Kernel(weight, None)(given), expected.expand(9, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [(1000.0, 1000.00006), (-3e-7, 0.0), (5.0, 5.0), (-1.0, 1e6), (-0.17, 3.0)])
def test_no_activation_is_past_the_zero_point(values: tuple[float, float]) -> None:
    rows = torch.tensor([[*values] * 8])
    integers, scale, middle = quantised(rows)
    assert integers.abs().max() <= int8._ZERO_POINT
    assert ((integers * scale + middle - rows).abs() <= scale / 2 + rows.abs() * 2**-22).all()


@pytest.mark.usefixtures("_by")
def test_no_token_depends_on_its_neighbours() -> None:
    kernel, given = Int8Kernel(numbers(96, 64), None), numbers(70, 64, seed=2)
    together = kernel(given)
    assert torch.equal(together, torch.cat([kernel(row[None]) for row in given]))
    wild = given.clone()
    wild[1:] *= 1000
    wild[2] = torch.nan
    for row, astray in enumerate((torch.nan, torch.inf, -torch.inf), 3):
        wild[row, 40] = astray  # a single number, among others that have a range
    assert torch.equal(kernel(wild)[0], together[0])
    assert kernel(torch.zeros(1, 64)).eq(0).all()
    assert quantised(torch.zeros(1, 64))[0].eq(0).all()  # and not by what a cast makes of a NaN
    assert not kernel(wild)[2:6].isfinite().any()


def test_a_model_in_eight_bits_stays_close_and_lets_its_floats_go(
    toy: Toy, toy_directory: Path, rows: list[Row]
) -> None:
    """Within the stated bound, a root-mean-square difference of some per cent of the logits' own."""
    model = load(toy_directory)
    quantise(model)
    with torch.inference_mode():
        hidden_T_D = toy.hidden(rows, model=model)
        logits = model.logits(hidden_T_D)
        targets = torch.cat([row.ids_T for row in rows])
        losses = token_losses(model.lm_head, hidden_T_D, targets)
    exact = torch.cat(toy.logits(rows))
    assert (logits - exact).square().mean().sqrt() < BOUND * exact.square().mean().sqrt()
    torch.testing.assert_close(losses, -logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    assert sum(p.numel() for name, p in model.named_parameters() if "proj" in name or "linear_fc" in name) < 2000
    # Alone and packed it is the same to the bit but for what is not eight bits: attention and norms.
    with torch.inference_mode():
        alone = torch.cat([toy.hidden([row], model=model) for row in rows])
    torch.testing.assert_close(alone, hidden_T_D, rtol=0, atol=0.05)


def test_adapters_are_worn_over_eight_bits(toy: Toy, toy_directory: Path, rows: list[Row]) -> None:
    model = load(toy_directory)
    quantise(model)
    adapter = Adapter.new(model.config, AdapterConfig(r=4), seed=1)
    for pair in adapter.pairs.values():
        pair.b_O_R.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    tokens = sum(len(row.ids_T) for row in rows)
    with torch.inference_mode():
        worn = toy.hidden(rows, AdapterBatch.uniform(adapter, tokens), model=model)
        right = toy.hidden(rows, AdapterBatch.uniform(adapter, tokens))
        plain = toy.hidden(rows, model=model)
    assert (worn - right).norm() < BOUND * right.norm()
    assert (worn - plain).norm() > 0.2 * right.norm()


def test_a_tied_embedding_stays_a_table(tied_toy: Toy, rows: list[Row]) -> None:
    model = copy.deepcopy(tied_toy.model)
    quantise(model)
    assert torch.equal(model.language_model.embed_tokens.weight, tied_toy.model.language_model.embed_tokens.weight)
    with torch.inference_mode():
        logits = model.logits(tied_toy.hidden(rows, model=model))
    exact = torch.cat(tied_toy.logits(rows))
    assert (logits - exact).square().mean().sqrt() < BOUND * exact.square().mean().sqrt()
