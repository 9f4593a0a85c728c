"""A base in training: what has been used leaves memory, and every number is the same."""

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer_trainer.worker.loop import base
from veneer_trainer.worker.loop.base import load_base
from veneer_vlm.weights import load

Bench = Any  # of conftest.py
PAGES = Path("/proc/self/pagemap")
linux = pytest.mark.skipif(not PAGES.exists(), reason="needs Linux, which tells what is resident")


def resident_share(weights: list[torch.Tensor]) -> float:
    """Of the pages on which weights begin: those in this process's memory, by bit 63 of their entries (proc(5))."""
    with PAGES.open("rb", buffering=0) as pages:
        present = []
        for weight in weights:
            pages.seek(weight.data_ptr() // mmap.PAGESIZE * 8)
            present.append(int.from_bytes(pages.read(8), "little") >> 63)
    return sum(present) / len(present)


@linux
def test_a_frozen_tower_leaves_memory_behind_a_picture_and_sees_the_same(bench: Bench) -> None:
    model, plain = load_base(bench.directory, torch.float32, "cpu"), load(bench.directory)
    assert {weight.data_ptr() for weight in model.mapped} == {each.data_ptr() for each in model.visual.parameters()}
    (picture,) = bench.steps(bench.plan(), bench.rows(1))[0].passes[0].pictures
    with torch.no_grad():
        wanted = plain.see(picture.patches_P_X, [picture.grid])
        for _ in range(2):
            seen = model.see(picture.patches_P_X, [picture.grid])
            assert torch.equal(seen.tokens_M_D, wanted.tokens_M_D)
            assert resident_share(model.mapped) == 0
    model.see(picture.patches_P_X, [picture.grid])  # its gradients would want the weights again
    assert resident_share(model.mapped) == 1


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
