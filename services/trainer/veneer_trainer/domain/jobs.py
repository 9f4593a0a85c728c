"""A training job: queued work whose order is a training spec, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec

from veneer_rpc.names import TrainingJobName
from veneer_trainer.domain.spec import TrainingSpec
from veneer_trainer.domain.work import Work


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job is expected to take; None where it is not known."""

    steps: int | None = None
    tokens_per_epoch: int | None = None
    total_tokens: int | None = None
    trainable_parameters: int | None = None
    duration_s: float | None = None
    peak_memory_bytes: int | None = None
    worker_class: str = ""
    available_memory_bytes: int | None = None
    fits: bool = True
    suggestions: tuple[str, ...] = ()
    over_length_rows: int | None = None
    longest_row_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for, with every default filled in. Never changes."""

    spec: TrainingSpec
    display_name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    estimate: Estimate = Estimate()


@dataclass(frozen=True, slots=True)
class Contract:
    """The processing contract that rows and pictures go through."""

    digest: str
    model_digest: str
    tokenizer_digest: str
    template_digest: str
    min_pixels: int
    max_pixels: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    interpolation: str
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    picture_rule: str
    mask_rule: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """What the first attempt decided beyond the spec; sealed from then on."""

    model_digest: str
    contract: Contract | None
    dtype: str
    device: str
    target_modules: tuple[str, ...]
    trainable_parameters: int
    train_rows: int
    skipped_rows: int
    total_steps: int
    checkpoint_interval_steps: int
    activation_checkpointing: bool
    numerics: Mapping[str, str]
    co_trained_jobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Figures of a run at one step; units as in the contract, times in seconds."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    rows_per_second: float
    peak_memory_bytes: int
    elapsed_s: float
    measured_s: float
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    remaining_s: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a job's curve: figures at a step, None where they were not measured."""

    FIGURES: ClassVar = (
        "loss", "learning_rate", "gradient_norm", "epoch", "tokens_per_second", "rows_per_second",
        "peak_memory_bytes",
    )  # fmt: skip

    step: int
    measured_s: float
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    epoch: float | None = None
    tokens_per_second: float | None = None
    rows_per_second: float | None = None
    peak_memory_bytes: float | None = None
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job so far."""

    resolved: Resolved | None = None
    adapter_version: str = ""
    adapter_digest: str = ""
    evaluations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A job's typed parts, and the work that carries them."""

    work: Work
    order: Order
    outcome: Outcome
    progress: Progress | None

    @property
    def name(self) -> TrainingJobName:
        """The resource's name."""
        return TrainingJobName(self.work.ref.id)

    @property
    def spec(self) -> TrainingSpec:
        """The job's parameters."""
        return self.order.spec


def job_of(work: Work) -> TrainingJob:
    """Returns the job that a piece of training work is."""
    return TrainingJob(
        work,
        msgspec.json.decode(work.order, type=Order),
        msgspec.json.decode(work.outcome, type=Outcome) if work.outcome else Outcome(),
        msgspec.json.decode(work.progress, type=Progress) if work.progress else None,
    )


def as_json(part: Order | Outcome | Progress) -> str:
    """Returns the JSON that `job_of` reads."""
    return msgspec.json.encode(part).decode()
