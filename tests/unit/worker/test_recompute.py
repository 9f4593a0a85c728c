"""Layers that are computed twice where memory is short: the same adapter to the byte, and the layer's calls counted."""

from typing import Any

import pytest
import torch

from veneer_trainer.worker.loop import learner
from veneer_vlm import decoder

Bench = Any  # of conftest.py
LORA = {"dropout": 0.3, "target_modules": ["decoder+merger+vision"]}


def trained(bench: Bench, monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> tuple[dict[str, torch.Tensor], int]:
    """The adapter after four steps with so much memory free, and how often its first layer was computed."""
    decoder = bench.model.language_model
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    with monkeypatch.context() as patch:
        patch.setattr(learner, "free_memory_bytes", lambda device: free_bytes)
        patch.setattr(decoder, "recompute", False)
        hook = decoder.layers[0].register_forward_pre_hook(count)
        try:
            run = bench.run(lora=LORA)
            run.learn(bench.rows(4 * run.plan.rows_per_step))
        finally:
            hook.remove()
    return run.weights(), calls


def test_with_little_memory_layers_are_computed_twice_and_learn_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty, once = trained(bench, monkeypatch, 1 << 40)
    little, twice = trained(bench, monkeypatch, 1 << 10)
    assert (once, twice) == (4, 8)
    assert all(torch.equal(plenty[name], little[name]) for name in plenty)
    assert any(tensor.abs().max() > 0 for name, tensor in little.items() if "lora_B" in name)


def test_jobs_share_no_more_than_memory_allows_without_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, kept = bench.model.language_model, learner._losses
    passes: list[int] = []

    def counted(parts: Any) -> Any:  # noqa: ANN401
        passes.append(len(parts))
        return kept(parts)

    monkeypatch.setattr(learner, "_losses", counted)
    monkeypatch.setattr(decoder, "recompute", False)
    runs = [bench.run(seed=seed) for seed in range(3)]
    steps = [bench.steps(run.plan, bench.rows(4))[0] for run in runs]
    tokens = len(steps[0].passes[0].ids_T)
    # Room for two jobs' rows, then for one's.
    for jobs, sizes in ((2, [2, 1]), (1, [1, 1, 1])):
        passes.clear()
        free_bytes = decoder.kept_bytes(tokens) * jobs / learner._ACTIVATIONS_SHARE
        monkeypatch.setattr(learner, "free_memory_bytes", lambda device, free_bytes=free_bytes: free_bytes)
        for run in runs:
            run.learner._largest_pass = 0
        learner.learn_together([learner.Turn(run.learner, step, 1e-2) for run, step in zip(runs, steps, strict=True)])
        assert passes == sizes
        assert not decoder.recompute


def test_no_gradient_no_second_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.model.language_model, "recompute", True)
    run = bench.run(lora=LORA)
    steps = bench.steps(run.plan, bench.rows(run.plan.rows_per_step))
    monkeypatch.setattr("veneer_vlm.decoder.checkpoint", None)  # would be called
    assert run.learner.loss(steps) > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_gates_are_not_kept_but_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    calls, swiglu = [], decoder.swiglu
    monkeypatch.setattr(bench.model.language_model, "recompute", recompute)
    monkeypatch.setattr(decoder, "swiglu", lambda gate_up: calls.append(torch.is_grad_enabled()) or swiglu(gate_up))
    run = bench.run(lora=LORA)
    run.learn(bench.rows(run.plan.rows_per_step))
    layers = len(bench.model.language_model.layers)
    assert len(calls) == 2 * layers  # a layer that is computed twice makes none a third time
