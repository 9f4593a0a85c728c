"""What a training job is asked to do: the parameters, their defaults and their bounds.

The defaults are those of the contract (`training_job.proto`). What a spec leaves to the machine (AUTO, the
number of steps, the checkpoint interval) is resolved at admission and is not decided here. Whether base, data
and targets exist is the registry's to say.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from veneer_rpc.errors import Violations, violations
from veneer_rpc.names import AdapterName, AdapterVersionName, DatasetVersionName, ModelName


class Dtype(Enum):
    """How the base is held while training; the adapter is always fp32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Schedule(Enum):
    """How the learning rate goes after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class OverLength(Enum):
    """What becomes of rows longer than `max_length`."""

    REFUSE = "refuse"
    SKIP = "skip"


class Priority(Enum):
    """Which queue a job waits in."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class CoTrain(Enum):
    """Whether a job may share a pass over the base with others."""

    FORBIDDEN = "forbidden"
    ALLOWED = "allowed"


DEFAULT_MAX_PIXELS = 448 * 448
"""Bound on a picture's area, in pixels, where nobody names one."""

PRESETS = ("attention", "decoder", "decoder+merger", "decoder+merger+vision")
"""Names that stand for groups of linears; `attention` is q_proj and v_proj of the decoder."""

_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_SPLIT = re.compile(r"[a-z0-9_-]{1,32}")


class Bound(NamedTuple):
    """A range of numbers: from `low` to `high`, either of which may be open."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """True when the value lies in the range; NaN never does."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"greater than {self.low:g}" if self.low_open else f"at least {self.low:g}"
        if math.isinf(self.high):
            return low
        return f"{low}, {'less than' if self.high_open else 'at most'} {self.high:g}"


@dataclass(frozen=True, slots=True)
class Lora:
    """The low-rank update, with PEFT's meanings."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("attention",)
    use_rslora: bool = False
    use_dora: bool = False


@dataclass(frozen=True, slots=True)
class Optimizer:
    """AdamW with warm-up, then the schedule."""

    learning_rate: float = 2e-4
    schedule: Schedule = Schedule.COSINE
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_gradient_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Ends training after `patience` validations without a fall of at least `min_delta`."""

    patience: int
    min_delta: float = 0.0


@dataclass(frozen=True, slots=True)
class PlannedEvaluation:
    """An evaluation to queue after publishing; without a dataset version, on the job's own."""

    split: str
    dataset_version: DatasetVersionName | None = None


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """A job's parameters. Exactly one of `epochs` and `steps` is set."""

    model: ModelName
    dataset_version: DatasetVersionName
    adapter: AdapterName | None
    train_split: str = "train"
    validation_split: str | None = None
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int | None = 3
    steps: int | None = None
    batch_size: int = 1
    gradient_accumulation: int = 2
    max_length: int = 512
    over_length: OverLength = OverLength.REFUSE
    max_pixels: int = DEFAULT_MAX_PIXELS
    dtype: Dtype = Dtype.AUTO
    seed: int = 0
    priority: Priority = Priority.NORMAL
    co_train: CoTrain = CoTrain.FORBIDDEN
    validation_interval_steps: int = 0
    early_stopping: EarlyStopping | None = None
    checkpoint_interval_steps: int | None = None
    initial_adapter_version: AdapterVersionName | None = None
    evaluations: tuple[PlannedEvaluation, ...] = ()

    def check(self, field: str = "spec") -> None:
        """Checks every bound of the contract.

        Args:
            field: path of the spec in the request, for the violations.

        Raises:
            InvalidArgument: with every violation at once.
        """
        with violations() as found:
            self._check_numbers(found, field)
            self._check_names(found, field)

    def _check_numbers(self, found: Violations, field: str) -> None:
        for name, (bound, value) in self._bounded().items():
            if value is not None and not bound.holds(value):
                found.add(f"{field}.{name}", "OUT_OF_RANGE", f"must be {bound}, was {value:g}")

    def _bounded(self) -> dict[str, tuple[Bound, float | None]]:
        optimizer, stopping = self.optimizer, self.early_stopping
        return {
            "lora.rank": (Bound(1, 512), self.lora.rank),
            "lora.alpha": (Bound(0, 4096, low_open=True), self.lora.alpha),
            "lora.dropout": (Bound(0, 1, high_open=True), self.lora.dropout),
            "optimizer.learning_rate": (Bound(0, 1, low_open=True), optimizer.learning_rate),
            "optimizer.warmup_ratio": (Bound(0, 1), optimizer.warmup_ratio),
            "optimizer.weight_decay": (Bound(0, 1), optimizer.weight_decay),
            "optimizer.beta1": (Bound(0, 1, high_open=True), optimizer.beta1),
            "optimizer.beta2": (Bound(0, 1, high_open=True), optimizer.beta2),
            "optimizer.max_gradient_norm": (Bound(0, math.inf, high_open=True), optimizer.max_gradient_norm),
            "epochs": (Bound(1, 10_000), self.epochs),
            "steps": (Bound(1, 10_000_000), self.steps),
            "batch_size": (Bound(1, 1024), self.batch_size),
            "gradient_accumulation": (Bound(1, 1024), self.gradient_accumulation),
            "max_length": (Bound(16, math.inf), self.max_length),
            "max_pixels": (Bound(1024, math.inf), self.max_pixels),
            "seed": (Bound(0, 2**63 - 1), self.seed),
            "validation_interval_steps": (Bound(0, 10_000_000), self.validation_interval_steps),
            "checkpoint_interval_steps": (Bound(1, 10_000_000), self.checkpoint_interval_steps),
            "early_stopping.patience": (Bound(1, 1000), stopping.patience if stopping else None),
            "early_stopping.min_delta": (
                Bound(0, math.inf, high_open=True),
                stopping.min_delta if stopping else None,
            ),
        }

    def _check_names(self, found: Violations, field: str) -> None:
        targets = self.lora.target_modules
        presets = [name for name in targets if name in PRESETS]
        if presets and len(targets) > 1:
            text = f"a preset stands alone, was {presets[0]!r} among {len(targets)} names"
            found.add(f"{field}.lora.target_modules", "PRESET_NOT_ALONE", text)
        if self.lora.use_dora:
            found.add(f"{field}.lora.use_dora", "DORA_UNSUPPORTED", "no worker trains DoRA: leave it false")
        for index, name in enumerate(targets):
            if name not in PRESETS and not _MODULE.fullmatch(name):
                text = f"must be a module's whole name or one of {', '.join(PRESETS)}, was {name[:80]!r}"
                found.add(f"{field}.lora.target_modules[{index}]", "INVALID_TARGET_MODULE", text)
        splits = {"train_split": self.train_split, "validation_split": self.validation_split}
        splits |= {f"evaluations[{i}].split": planned.split for i, planned in enumerate(self.evaluations)}
        for place, split in splits.items():
            if split is not None and not _SPLIT.fullmatch(split):
                text = f"must be 1-32 of a-z, 0-9, '-' and '_', was {split[:80]!r}"
                found.add(f"{field}.{place}", "INVALID_SPLIT", text)
        if len(self.evaluations) > 8:
            text = f"at most 8 evaluations, were {len(self.evaluations)}"
            found.add(f"{field}.evaluations", "TOO_MANY", text)
