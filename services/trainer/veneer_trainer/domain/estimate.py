"""What a training job is expected to take: arithmetic over counted tokens and measured costs.

Costs come from workers' calibrations. A calibration fits a job on the same base and, where the job names one,
in the same dtype; of those of one class the nearest in adapted linears is taken, then in rank. What was not counted or
measured stays unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from veneer_trainer.domain.jobs import Estimate
from veneer_trainer.domain.spec import Dtype, TrainingSpec
from veneer_trainer.domain.targets import targeted, trainable_parameters
from veneer_trainer.domain.workers import Calibration, StepCost, Worker
from veneer_trainer.ports import BaseModel, SplitFacts

_MIN_PIXELS = 1024
_SEEING = {"merger", "vision"}  # adapted parts with which pictures go through the tower in every step
PASS_TOKENS = 2048
"""Batches of one step are computed together up to so many tokens: a larger product wastes less of the machine."""


@dataclass(frozen=True, slots=True)
class RowLoad:
    """Tokens of a row, or of several that are equally long; supervised ones are among the text tokens."""

    text: float
    visual: float
    supervised: float
    rows: float = 1.0

    def times(self, factor: float) -> RowLoad:
        """Returns the tokens of `factor` such rows."""
        return RowLoad(self.text * factor, self.visual * factor, self.supervised * factor, self.rows * factor)

    def cost(self, costs: StepCost) -> float:
        """Returns what a step of these rows costs."""
        return costs.of(self.text, self.visual, self.supervised, (self.text + self.visual) ** 2 / self.rows)


def total_steps(spec: TrainingSpec, rows: int) -> int:
    """Returns the optimiser steps of a job: an epoch's last step may have fewer rows."""
    if spec.steps is not None:
        return spec.steps
    return (spec.epochs or 0) * math.ceil(rows / _rows_per_step(spec))


def estimate(spec: TrainingSpec, base: BaseModel, split: SplitFacts, workers: Iterable[Worker]) -> Estimate:
    """Returns what is known of a job's cost on the worker class that does it soonest.

    Args:
        spec: the job.
        base: the base that it stands on.
        split: its training split; token counts only where they fit the job's contract.
        workers: who could do it, with what they have measured.

    Raises:
        InvalidArgument: target modules or rank do not fit the base.
    """
    linears = targeted(base.linears, spec.lora)
    parameters = trainable_parameters(linears.values(), spec.lora)
    steps = total_steps(spec, split.rows)
    known = Estimate(steps=steps, trainable_parameters=parameters, longest_row_tokens=split.longest_row)
    able = [worker for worker in workers if _holds(worker, base, spec)]
    row = _mean_row(split)
    if row is None:
        return _on_some_class(known, able)
    tokens = round((row.text + row.visual) * split.rows)
    known = replace(
        known,
        tokens_per_epoch=tokens,
        total_tokens=round((row.text + row.visual) * min(steps * _rows_per_step(spec), _epoch_rows(spec, split))),
    )
    offers = [offer for worker in able if (offer := _offer(known, spec, base, split, row, worker))]
    if not offers:
        return _on_some_class(known, able)
    fitting = [offer for offer in offers if offer.fits]
    if fitting:
        return min(fitting, key=lambda offer: offer.duration_s or math.inf)
    largest = max(offers, key=lambda offer: offer.available_memory_bytes or 0)
    worker = next(each for each in able if each.worker_class == largest.worker_class)
    return replace(largest, suggestions=_suggestions(known, spec, base, split, row, worker))


def _offer(
    known: Estimate, spec: TrainingSpec, base: BaseModel, split: SplitFacts, row: RowLoad, worker: Worker
) -> Estimate | None:
    """The job on one worker; None where it has measured nothing like it."""
    costs = _nearest(spec, base, worker)
    if costs is None:
        return None
    own_rows = math.ceil(_rows_per_step(spec) / worker.ranks)
    step = row.times(own_rows)
    # The peak is the largest pass; its text and pictures are taken to stand as in the mean row.
    peak = row.times(_pass_tokens(spec, own_rows, split.longest_row or 0) / (row.text + row.visual))
    kept = min(costs.kept_bytes_per_visual_token * row.visual * split.rows, costs.kept_bytes_limit)
    pass_bytes = peak.cost(costs.memory_bytes)
    peak_bytes = math.ceil(max(pass_bytes, costs.least_memory_bytes) + kept)
    steps = known.steps or 0
    seen = step.visual * steps
    if not _groups(targeted(base.linears, spec.lora), base) & _SEEING:
        # A frozen tower sees each picture once; pictures that rows share are not known here, and count again.
        seen = min(row.visual * split.rows, seen)
    return replace(
        known,
        duration_s=steps * step.cost(costs.seconds) + costs.tower_seconds_per_visual_token * seen,
        peak_memory_bytes=peak_bytes,
        worker_class=worker.worker_class,
        available_memory_bytes=worker.memory_bytes,
        fits=peak_bytes <= worker.memory_bytes,
    )


def _suggestions(
    known: Estimate, spec: TrainingSpec, base: BaseModel, split: SplitFacts, row: RowLoad, worker: Worker
) -> tuple[str, ...]:
    """Single changes that make the job fit on a worker, the mildest of each kind."""
    found = []
    for batch_size in _halves(spec.batch_size, 1):
        offer = _offer(known, replace(spec, batch_size=batch_size), base, split, row, worker)
        if offer is not None and offer.fits:
            found.append(f"batch_size={batch_size}")
            break
    for max_pixels in _halves(spec.max_pixels, _MIN_PIXELS):
        share = max_pixels / spec.max_pixels
        smaller = replace(row, visual=row.visual * share)
        longest = round((split.longest_row or 0) * (smaller.text + smaller.visual) / (row.text + row.visual))
        offer = _offer(known, spec, base, replace(split, longest_row=longest), smaller, worker)
        if offer is not None and offer.fits and row.visual:
            found.append(f"max_pixels={max_pixels}")
            break
    return tuple(found)


def _halves(value: int, least: int) -> Iterable[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _pass_tokens(spec: TrainingSpec, rows: int, longest_row: int) -> int:
    """Tokens of the largest pass of so many rows: a batch of the longest, or as many batches as are packed together."""
    return min(rows * longest_row, max(spec.batch_size * longest_row, PASS_TOKENS))


def _rows_per_step(spec: TrainingSpec) -> int:
    return spec.batch_size * spec.gradient_accumulation


def _epoch_rows(spec: TrainingSpec, split: SplitFacts) -> float:
    return math.inf if spec.epochs is None else spec.epochs * split.rows


def _mean_row(split: SplitFacts) -> RowLoad | None:
    if split.visual_tokens is None or split.prompt_tokens is None or split.supervised_tokens is None:
        return None
    text = split.prompt_tokens + split.supervised_tokens
    if not split.rows or not text:
        return None
    return RowLoad(text, split.visual_tokens, split.supervised_tokens, split.rows).times(1 / split.rows)


def _holds(worker: Worker, base: BaseModel, spec: TrainingSpec) -> bool:
    right_dtype = spec.dtype is Dtype.AUTO or spec.dtype.value in worker.dtypes
    return base.digest in worker.models.values() and right_dtype


def _nearest(spec: TrainingSpec, base: BaseModel, worker: Worker) -> Calibration | None:
    wanted = frozenset(targeted(base.linears, spec.lora))
    groups = _groups(wanted, base)

    def distance(costs: Calibration) -> tuple[bool, int, float]:
        """A tower that is trained costs more than all else; each adapted linear costs about the same again."""
        measured = frozenset(costs.target_modules)
        ranks = abs(math.log2(costs.rank / spec.lora.rank))
        return "vision" in groups ^ _groups(measured, base), len(measured ^ wanted), ranks

    fitting = [
        costs
        for costs in worker.calibrations
        if costs.model_digest == base.digest and spec.dtype.value in (Dtype.AUTO.value, costs.dtype)
    ]
    return min(fitting, key=distance, default=None)


def _groups(names: Iterable[str], base: BaseModel) -> set[str]:
    """Of the base's linears: which parts of it are adapted."""
    return {base.linears[name].group for name in names if name in base.linears}


def _on_some_class(known: Estimate, able: list[Worker]) -> Estimate:
    """The estimate without a calibration: at least who would do it."""
    if not able:
        return known
    worker = max(able, key=lambda each: each.memory_bytes)
    return replace(known, worker_class=worker.worker_class, available_memory_bytes=worker.memory_bytes)
