"""Half precision: the same products as float32's, and a model that says the same in half of its memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from veneer_vlm import half
from veneer_vlm.half import HalfKernel, pack
from veneer_vlm.loss import token_losses
from veneer_vlm.weights import load

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Row, Toy

pytestmark = pytest.mark.skipif(not half.SUPPORTED, reason="half precision is for x86 with AVX2")


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 6, 8, 65])
def test_a_product_is_the_wide_weights(
    dtype: torch.dtype, biased: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "_PACKED_AT_ONCE", 37)  # of 96 outputs
    weight = numbers(96, 80).mul_(0.02).to(dtype)
    bias = numbers(96, seed=3) if biased else None
    kernel = HalfKernel.of(weight, bias)
    assert kernel is not None
    wide = numbers(tokens, 160, seed=2)
    for given in (wide[:, :80].contiguous(), wide[:, ::2]):  # the second is not contiguous
        assert_close(kernel(given), F.linear(given, weight.float(), bias), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(numbers(96, 80), id="24 bits"),
        pytest.param(numbers(96, 80).mul_(1e-5).bfloat16(), id="too small"),
        pytest.param(numbers(96, 80).mul_(1e5).bfloat16(), id="too large"),
        pytest.param(numbers(96, 80).bfloat16().index_fill_(0, torch.tensor([5]), torch.nan), id="astray"),
    ],
)
def test_what_half_precision_does_not_hold_is_not_packed(weight: torch.Tensor) -> None:
    assert HalfKernel.of(weight, None) is None


def test_a_few_numbers_that_lose_bits_do_not_matter() -> None:
    weight = numbers(96, 80).mul_(0.02).bfloat16()
    weight[0, :3] = torch.tensor([1.01e-7, 3e-9, 0])
    assert not torch.equal(weight.half().float(), weight.float())
    assert HalfKernel.of(weight, None) is not None


@pytest.fixture
def stored(toy_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy in bfloat16, all its weights large; one of its linears is more than half precision holds."""
    monkeypatch.setattr("veneer_vlm.model.LARGE", 1000)
    directory = Path(shutil.copytree(toy_directory, tmp_path / "stored"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors["model.language_model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("as_stored", [False, True])
def test_a_packed_model_says_the_same(toy: Toy, stored: Path, rows: list[Row], as_stored: bool) -> None:
    model, wide = load(stored, as_stored=True), load(stored)
    pack(model, as_stored=as_stored)
    left = {name: parameter for name, parameter in model.named_parameters() if parameter.dtype is torch.bfloat16}
    held = {name for name, parameter in left.items() if parameter.numel()}
    down = "language_model.layers.0.mlp.down_proj"
    assert held == {"language_model.embed_tokens.weight", *([f"{down}.weight"] if as_stored else [])}
    assert isinstance(model.lm_head.kernel, HalfKernel)
    assert not isinstance(model.get_submodule(down).kernel, HalfKernel)
    targets = torch.cat([row.ids_T for row in rows])
    said = []
    for each in (model, wide):
        with torch.inference_mode():
            hidden_T_D = toy.hidden(rows, model=each)
            said.append((hidden_T_D, each.logits(hidden_T_D), token_losses(each.lm_head, hidden_T_D, targets)))
    for ours, right in zip(*said, strict=True):
        assert_close(ours, right, rtol=1e-4, atol=1e-4)
