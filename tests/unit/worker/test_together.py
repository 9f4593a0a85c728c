"""Several jobs in one pass: each learns what it learns alone, whatever becomes of the others."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from veneer_trainer.worker.loop import group, learner
from veneer_trainer.worker.loop.learner import Turn, learn_together
from veneer_trainer.worker.refusal import Refused

Bench = Run = Message = Any  # classes of conftest.py; fields of a spec
STEPS = 5
JOBS: list[dict[str, Message]] = [
    {"seed": 3},
    {"seed": 4, "lora": {"rank": 16, "alpha": 8.0, "dropout": 0.3}},
    {"seed": 5, "batch_size": 1, "lora": {"use_rslora": True}, "optimizer": {"weight_decay": 0.1}},
]


def runs(bench: Bench, targets: str, jobs: Sequence[dict[str, Message]] = JOBS) -> list[Run]:
    return [bench.run(**job | {"lora": {"target_modules": [targets]} | job.get("lora", {})}) for job in jobs]


def steps(bench: Bench, run: Run, job: int) -> list[Message]:
    """The job's own data: rows of different lengths and pictures."""
    rows = [
        bench.row(10 * job + number, "answer " * (1 + (number + job) % 3), pictures=(number + job) % 2)
        for number in range(STEPS * run.plan.rows_per_step)
    ]
    return bench.steps(run.plan, rows)


def curves(bench: Bench, together: Sequence[Run], rates: Sequence[float]) -> list[list[float]]:
    """The losses of each run, trained in shared passes."""
    losses: list[list[float]] = [[] for _ in together]
    for taken in zip(*(steps(bench, run, job) for job, run in enumerate(together)), strict=True):
        turns = [Turn(run.learner, step, rate) for run, step, rate in zip(together, taken, rates, strict=True)]
        assert learn_together(turns) == [None] * len(turns)
        for run, curve in zip(together, losses, strict=True):
            curve.append(run.state.figures.loss)
    return losses


@pytest.mark.parametrize("targets", ["decoder", "decoder+merger+vision"])
def test_each_jobs_losses_and_weights_are_those_of_its_run_alone(bench: Bench, targets: str) -> None:
    rates = [1e-2, 3e-3, 1e-2]
    together, alone = runs(bench, targets), runs(bench, targets)
    shared = curves(bench, together, rates)
    for job, (run, rate) in enumerate(zip(alone, rates, strict=True)):
        own = []
        for step in steps(bench, run, job):
            run.learner.learn(step, rate)
            own.append(run.state.figures.loss)
        assert shared[job] == pytest.approx(own, abs=1e-4)
        assert own[0] - own[-1] > 1e-3, "nothing was learned"
        weights, theirs = run.weights(), together[job].weights()
        assert max((weights[name] - theirs[name]).abs().max().item() for name in weights) < 1e-4


def test_passes_are_shared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[int]] = []
    forward = learner._losses

    def counted(parts: Sequence[Message]) -> list[torch.Tensor]:
        passes.append([together.index(next(run for run in together if run.learner is part.learner)) for part in parts])
        return forward(parts)

    monkeypatch.setattr(learner, "_losses", counted)
    together = runs(bench, "decoder")
    curves(bench, together, [1e-2] * 3)
    assert passes == [[0, 1, 2]] * STEPS
    passes.clear()
    monkeypatch.setattr(learner, "PASS_TOKENS", 1)
    together = runs(bench, "decoder")
    curves(bench, together, [1e-2] * 3)
    assert passes == [[0], [1], [2]] * STEPS


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_one_changes_nothing_in_the_others(bench: Bench, value: float) -> None:
    together, alone = runs(bench, "decoder"), runs(bench, "decoder")
    broken = next(iter(together[1].state.adapter.pairs.values()))
    with torch.no_grad():
        broken.a_R_I[0, 0] = value
    before = together[1].weights()
    taken = [steps(bench, run, job)[0] for job, run in enumerate(together)]
    first, refused, third = learn_together(
        [Turn(run.learner, step, 1e-2) for run, step in zip(together, taken, strict=True)]
    )
    assert first is None
    assert third is None
    assert isinstance(refused, Refused)
    assert refused.reason == "NON_FINITE_LOSS"
    assert all(torch.equal(before[name].nan_to_num(), w.nan_to_num()) for name, w in together[1].weights().items())
    assert all(tensor.grad is None for _, tensor in together[1].state.adapter.tensors())
    for job in (0, 2):
        alone[job].learner.learn(taken[job], 1e-2)
        assert together[job].state.figures.loss == pytest.approx(alone[job].state.figures.loss, abs=1e-4)
        weights, theirs = alone[job].weights(), together[job].weights()
        assert max((weights[name] - theirs[name]).abs().max().item() for name in weights) < 1e-4


@pytest.mark.parametrize("pass_tokens", [4096, 1])  # all in one pass; or the first has gradients already
def test_a_pass_that_cannot_be_computed_ends_its_own_job_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, pass_tokens: int
) -> None:
    monkeypatch.setattr(learner, "PASS_TOKENS", pass_tokens)
    together, alone = runs(bench, "decoder"), runs(bench, "decoder")
    taken = [steps(bench, run, job)[0] for job, run in enumerate(together)]
    taken[1].passes[-1].ids_T[-1] = 1 << 30  # a token that the base does not have
    turns = [Turn(run.learner, step, 1e-2) for run, step in zip(together, taken, strict=True)]
    before = together[1].weights()
    first, broken, third = group._learn(turns)
    assert isinstance(broken, IndexError)
    assert (first, third) == (None, None)
    assert all(torch.equal(before[name], weight) for name, weight in together[1].weights().items())
    for job in (0, 2):
        alone[job].learner.learn(steps(bench, alone[job], job)[0], 1e-2)
        assert together[job].state.figures == alone[job].state.figures


def test_jobs_join_and_leave_between_steps(bench: Bench) -> None:
    together, alone = runs(bench, "decoder"), runs(bench, "decoder")
    rows = [steps(bench, run, job) for job, run in enumerate(together)]
    members = [(0, 1), (0, 1, 2), (0, 2), (2,)]
    taken = [0, 0, 0]
    for at in members:
        learn_together([Turn(together[job].learner, rows[job][taken[job]], 1e-2) for job in at])
        for job in at:
            taken[job] += 1
    for job, run in enumerate(alone):
        for step in rows[job][: taken[job]]:
            run.learner.learn(step, 1e-2)
        assert together[job].state.figures.step == taken[job]
        assert together[job].state.figures.loss == pytest.approx(run.state.figures.loss, abs=1e-4)


def test_jobs_that_do_not_fit_one_another_are_refused(bench: Bench) -> None:
    decoder, vision = runs(bench, "decoder", JOBS[:1])[0], runs(bench, "decoder+merger", JOBS[:1])[0]
    (one,), (other,) = bench.steps(decoder.plan, bench.rows()), bench.steps(vision.plan, bench.rows())
    with pytest.raises(ValueError, match="train the tower"):
        learn_together([Turn(decoder.learner, one, 1e-2), Turn(vision.learner, other, 1e-2)])
