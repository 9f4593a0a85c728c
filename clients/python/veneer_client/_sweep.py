"""Sweeps: the same order with other settings, and what became of each."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veneer.trainer.v1.training_job_pb2 import JobState, TrainingJob

MOST_JOBS = 64
AXES: Mapping[str, type[int] | type[float]] = {
    "rank": int, "alpha": float, "learning_rate": float, "epochs": int, "steps": int, "batch_size": int,
    "max_pixels": int, "seed": int,
}  # fmt: skip
"""What a sweep may vary: parameters of `jobs.train`, with their types."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A job of a comparison.

    Attributes:
        job: its last snapshot.
        settings: where it differs from the others, by name.
        is_best: whether it has the least validation loss; the least training loss where one has no other.
    """

    job: TrainingJob
    settings: Mapping[str, str]
    is_best: bool


def combinations(axes: Mapping[str, Sequence[float]]) -> list[dict[str, int | float]]:
    """Every choice of one value per axis, the last axis moving fastest.

    Raises:
        ValueError: an axis is unknown or empty, a value is not of its type, or there are too many jobs.
    """
    for name, values in axes.items():
        if name not in AXES:
            raise ValueError(f"{name} cannot be swept; there are {', '.join(AXES)}")
        if not values:
            raise ValueError(f"{name} has no values")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} has a value twice")
        if AXES[name] is int and any(value != int(value) for value in values):
            raise ValueError(f"{name} takes whole numbers")
    if (count := math.prod(map(len, axes.values()))) > MOST_JOBS:
        raise ValueError(f"these are {count} jobs; a sweep has at most {MOST_JOBS}")
    return [
        {name: AXES[name](value) for name, value in zip(axes, chosen, strict=True)}
        for chosen in itertools.product(*axes.values())
    ]


def compared(jobs: Sequence[TrainingJob]) -> list[Trial]:
    """Jobs side by side, in their order."""
    settings = [_settings(job) for job in jobs]
    differing = [name for name in settings[0] if len({each[name] for each in settings}) > 1] if settings else []
    ended = [job for job in jobs if job.state == JobState.JOB_STATE_SUCCEEDED]
    validated = all(job.progress.HasField("validation_loss") for job in ended)

    def loss(job: TrainingJob) -> float:
        return job.progress.validation_loss if validated else job.progress.loss

    best = min(ended, key=loss).name if len(ended) > 1 else None
    return [
        Trial(job, {name: each[name] for name in differing}, job.name == best)
        for job, each in zip(jobs, settings, strict=True)
    ]


def _settings(job: TrainingJob) -> dict[str, str]:
    spec = job.spec
    return {
        "dataset": spec.dataset_version,
        "model": spec.model,
        "targets": ", ".join(spec.lora.target_modules),
        "rank": str(spec.lora.rank),
        "alpha": f"{spec.lora.alpha:g}",
        "dropout": f"{spec.lora.dropout:g}",
        "learning rate": f"{spec.optimizer.learning_rate:g}",
        "epochs": str(spec.epochs) if spec.HasField("epochs") else "",
        "steps": str(spec.steps) if spec.HasField("steps") else "",
        "batch": f"{spec.batch_size} × {spec.gradient_accumulation}",
        "max pixels": str(spec.max_pixels),
        "seed": str(spec.seed),
    }
