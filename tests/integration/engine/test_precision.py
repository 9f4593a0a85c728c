"""Eight bits on the demonstration base: chosen by a held-out check, near to floats, and served."""

# ruff: noqa: ANN401  # fixtures of the conftest next to this

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer_base.unfold import base_directory
from veneer_inference.engine import precision
from veneer_inference.engine.client import EngineProcess
from veneer_inference.engine.precision import Difference, load_base
from veneer_inference.ports import Sampling
from veneer_vlm import bfloat16, half
from veneer_vlm.bfloat16 import PackedKernel
from veneer_vlm.half import HalfKernel
from veneer_vlm.int8 import Int8Kernel

TIE = precision.TIE


def in_eight_bits(model: Any) -> bool:
    return isinstance(model.language_model.layers[0].mlp.down_proj.kernel, Int8Kernel)


def test_auto_serves_eight_bits_where_the_check_allows_it_and_floats_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(precision, "pays", lambda: True)
    model, name = load_base(base_directory(), "auto", "cpu")
    assert name == "int8"
    assert in_eight_bits(model)
    monkeypatch.setattr(precision, "MOST_DIVERGENCE", 0.0)
    model, name = load_base(base_directory(), "auto", "cpu")
    assert name in ("bfloat16", "float32")
    assert str(model.dtype) == f"torch.{name}"
    assert not in_eight_bits(model)
    monkeypatch.setattr(precision, "pays", lambda: False)
    monkeypatch.setattr(precision, "quantised_difference", lambda *_: pytest.fail("checked in vain"))
    assert load_base(base_directory(), "auto", "cpu")[1] == name


@pytest.mark.parametrize("supported", [half.SUPPORTED, False])
@pytest.mark.parametrize("as_stored", [True, False])
def test_float32_reads_in_sixteen_bits_what_is_stored_in_them(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool, as_stored: bool
) -> None:
    base = Path(shutil.copytree(kit.base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, base / "model.safetensors")
    monkeypatch.setattr("veneer_vlm.model.LARGE", 0)
    monkeypatch.setattr(half, "SUPPORTED", supported)
    model, name = load_base(base, "float32", "cpu", as_stored=as_stored)
    assert name == "float32"
    assert model.dtype is torch.float32
    linear = model.language_model.layers[0].mlp.down_proj
    assert isinstance(linear.kernel, HalfKernel) == supported
    stored = torch.bfloat16 if supported or as_stored else torch.float32
    assert model.language_model.embed_tokens.weight.dtype is stored
    assert linear.weight.dtype is stored


@pytest.mark.parametrize("supported", [bfloat16.SUPPORTED, False])
def test_bfloat16_is_packed_where_the_cpu_multiplies_it(
    kit: Any, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    monkeypatch.setattr(bfloat16, "SUPPORTED", supported)
    model, name = load_base(kit.base, "bfloat16", "cpu")
    assert name == "bfloat16"
    linear = model.language_model.layers[0].mlp.down_proj
    assert isinstance(linear.kernel, PackedKernel) == supported
    assert bool(linear.weight.numel()) != supported


@pytest.mark.parametrize("difference", [Difference(0.06, 1.0), Difference(0.0, 0.97), Difference(float("nan"), 1.0)])
def test_what_the_check_does_not_allow(difference: Difference) -> None:
    assert Difference(0.01, 0.99).allowed
    assert not difference.allowed


@pytest.mark.asyncio(loop_scope="module")
async def test_an_engine_serves_eight_bits_and_keeps_the_tie_rule(kit: Any) -> None:
    """Alone and among others an answer is the same, but for tokens whose best two logits are a tie."""
    engine = await EngineProcess.start(kit.base, 1, dtype="int8")
    await kit.load_all(engine)
    assert engine.info.dtype == "int8"
    sampling = Sampling(12, logprobs=2)
    asked = [(kit.prompt(seed, 10 + 7 * seed), saved) for seed, saved in enumerate((None, *kit.adapters))]
    alone = [await kit.steps(engine, prompt, saved, sampling) for prompt, saved in asked]
    together = await asyncio.gather(*(kit.steps(engine, prompt, saved, sampling) for prompt, saved in asked))
    ties = 0
    for left, right in zip(alone, together, strict=True):
        # A step may bring several tokens: how they are grouped is not part of the answer.
        scores = [score for step in left for score in step.scores]
        ours, theirs = ([token for step in steps for token in step.token_ids] for steps in (left, right))
        for score, one, other in zip(scores, ours, theirs, strict=False):
            if one != other:
                (_, best), (_, second) = score.top
                assert best - second <= TIE
                ties += 1
                break  # what follows another token is another answer
    assert ties <= 1
    await engine.close()
