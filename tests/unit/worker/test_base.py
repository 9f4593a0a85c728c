"""A base in training: what has been used leaves memory, and every number is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from veneer_trainer.worker.loop import base
from veneer_trainer.worker.loop.base import load_base
from veneer_vlm.weights import load

Bench = Any  # of conftest.py
SMAPS = Path("/proc/self/smaps")
linux = pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux, which tells what is resident")


def resident_bytes(file: Path) -> int:
    """Memory of this process that is a file's."""
    total, inside = 0, False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = bool(rest) and rest[-1] == str(file)
        elif inside and first == "Rss:":
            total += int(rest[0]) * 1024
    return total


@linux
def test_a_frozen_tower_leaves_memory_behind_a_picture_and_sees_the_same(bench: Bench) -> None:
    model, plain = load_base(bench.directory, torch.float32, "cpu"), load(bench.directory)
    (file,) = bench.directory.glob("*.safetensors")
    assert {weight.data_ptr() for weight in model.mapped} == {each.data_ptr() for each in model.visual.parameters()}
    (picture,) = bench.steps(bench.plan(), bench.rows(1))[0].passes[0].pictures
    with torch.no_grad():
        wanted = plain.see(picture.patches_P_X, [picture.grid])
        for _ in range(2):
            seen = model.see(picture.patches_P_X, [picture.grid])
            assert torch.equal(seen.tokens_M_D, wanted.tokens_M_D)
            left = resident_bytes(file)
    model.see(picture.patches_P_X, [picture.grid])  # its gradients would want the weights again
    whole = resident_bytes(file)
    assert left < whole / 4


def test_memory_is_given_back_within_a_pass_and_the_adapter_is_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = type(bench)(bench.directory)
    given = []
    monkeypatch.setattr(base, "_LAYERS", 1)
    monkeypatch.setattr(base, "give_back_memory", lambda: given.append(torch.is_grad_enabled()))
    spare.model = load_base(bench.directory, torch.float32, "cpu")
    assert len(given) == 1  # what loading took
    layers = len(spare.model.language_model.layers)
    weights = []
    for worth_bytes, times in ((1 << 40, 0), (0, 2 * layers)):
        monkeypatch.setattr(base, "_WORTH_BYTES", worth_bytes)
        given.clear()
        run = spare.run(lora={"target_modules": ["decoder"]})
        run.learn(bench.rows(run.plan.rows_per_step))
        assert len(given) == times  # on the way there and back
        weights.append(run.weights())
    plain = bench.run(lora={"target_modules": ["decoder"]})
    plain.learn(bench.rows(plain.plan.rows_per_step))
    for made in weights:
        assert all(torch.equal(tensor, made[name]) for name, tensor in plain.weights().items())
