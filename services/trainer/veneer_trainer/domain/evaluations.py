"""An evaluation: queued work whose order is who to ask what, and the samples and figures that came of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from veneer_rpc.errors import Violations, violations
from veneer_rpc.names import AdapterVersionName, DatasetVersionName, EvaluationName, ModelName
from veneer_trainer.domain.spec import Priority
from veneer_trainer.domain.work import Failure, Work

METRICS = ("exact_match", "field_match", "field_f1", "cer", "anls", "rouge_l")
"""What a worker computes, and so what may be asked for."""

MAX_SAMPLES_AT_ONCE = 100

_SPLIT = re.compile(r"[a-z0-9_-]{1,32}")
_MAX_PROMPT_BYTES = 16 << 10
_MAX_TOKENS = 8192
_MAX_COMMENT_BYTES = 4 << 10

Subject = AdapterVersionName | ModelName
"""Who answers: an adapter version, or the base alone."""


@dataclass(frozen=True, slots=True)
class EvaluationSpec:
    """What to ask whom. `metrics` and `max_tokens` left empty and 0 are the worker's to choose from the answers."""

    subject: str
    dataset_version: DatasetVersionName
    split: str = "test"
    max_samples: int = 0
    prompt: str = ""
    max_tokens: int = 0
    metrics: tuple[str, ...] = ()
    priority: Priority = Priority.NORMAL

    def check(self) -> None:
        """Checks every bound of the contract; raises InvalidArgument with every violation."""
        with violations() as found:
            if not _SPLIT.fullmatch(self.split):
                text = f"must be 1-32 of a-z, 0-9, '-' and '_', was {self.split[:80]!r}"
                found.add("spec.split", "INVALID_SPLIT", text)
            if self.max_samples < 0:
                found.add("spec.max_samples", "OUT_OF_RANGE", f"must be 0 or more, was {self.max_samples}")
            if not 0 <= self.max_tokens <= _MAX_TOKENS:
                found.add("spec.max_tokens", "OUT_OF_RANGE", f"must be 1 to {_MAX_TOKENS}, was {self.max_tokens}")
            if (size := len(self.prompt.encode())) > _MAX_PROMPT_BYTES:
                found.add("spec.prompt", "TOO_LONG", f"at most {_MAX_PROMPT_BYTES} bytes, were {size}")
            for index, name in enumerate(self.metrics):
                if name not in METRICS:
                    text = f"must be one of {', '.join(METRICS)}, was {name[:80]!r}"
                    found.add(f"spec.metrics[{index}]", "UNKNOWN_VALUE", text)

    @property
    def rows(self) -> tuple[str, str, int, str]:
        """What must be equal for two evaluations to be compared."""
        return str(self.dataset_version), self.split, self.max_samples, self.prompt


@dataclass(frozen=True, slots=True)
class EvaluationOrder:
    """What was asked for, with the subject pinned by its digest. Never changes."""

    spec: EvaluationSpec
    answered_by_digest: str


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure with the ends of its 95 % confidence interval, over `count` samples or fields."""

    metric: str
    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One asked row; `latency_ms` from request to last token."""

    index: int
    row_digest: str
    picture_blobs: tuple[str, ...]
    prompt: str
    expected: str
    answer: str
    failure: Failure | None = None
    metrics: tuple[Metric, ...] = ()
    latency_ms: float = 0.0

    @property
    def hit(self) -> bool:
        """True when the answer is exactly the expected one."""
        return self.failure is None and self.answer == self.expected


@dataclass(frozen=True, slots=True)
class EvaluationFigures:
    """What the samples so far say."""

    metrics: tuple[Metric, ...] = ()
    answered: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation's typed parts, and the work that carries them."""

    work: Work
    order: EvaluationOrder
    figures: EvaluationFigures

    @property
    def name(self) -> EvaluationName:
        """The resource's name."""
        return EvaluationName(self.work.ref.id)

    @property
    def spec(self) -> EvaluationSpec:
        """What is asked of whom."""
        return self.order.spec

    def figure(self, metric: str) -> float | None:
        """Returns the value of a metric; None where it has none."""
        return next((each.value for each in self.figures.metrics if each.metric == metric), None)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A person's verdict; `uid`, `judge` and `created_s` are given by the store's side."""

    subject: str
    score: float
    other_subject: str = ""
    evaluation: str = ""
    sample_index: int = 0
    comment: str = ""
    judge: str = ""
    uid: str = ""
    created_s: float = 0.0

    def check(self, found: Violations) -> None:
        """Notes bounds that are passed."""
        if not 0 <= self.score <= 1:
            found.add("judgement.score", "OUT_OF_RANGE", f"must be 0 to 1, was {self.score:g}")
        if (size := len(self.comment.encode())) > _MAX_COMMENT_BYTES:
            found.add("judgement.comment", "TOO_LONG", f"at most {_MAX_COMMENT_BYTES} bytes, were {size}")
        if self.sample_index < 0:
            found.add("judgement.sample_index", "OUT_OF_RANGE", f"must be 0 or more, was {self.sample_index}")


def check_samples(samples: Sequence[Sample], metrics: Sequence[Metric], total: int) -> None:
    """Checks what a worker sends; raises InvalidArgument with every violation."""
    with violations() as found:
        if len(samples) > MAX_SAMPLES_AT_ONCE:
            found.add("samples", "TOO_MANY", f"at most {MAX_SAMPLES_AT_ONCE} samples, were {len(samples)}")
        if total < 1:
            found.add("total_samples", "OUT_OF_RANGE", f"must be 1 or more, was {total}")
        for place, sample in enumerate(samples[:MAX_SAMPLES_AT_ONCE]):
            if not 0 <= sample.index < max(total, 1):
                text = f"must be 0 to {total - 1}, was {sample.index}"
                found.add(f"samples[{place}].index", "OUT_OF_RANGE", text)
        for place, each in enumerate(metrics):
            if not all(map(math.isfinite, (each.value, each.low, each.high))):
                found.add(f"metrics[{place}]", "NOT_FINITE", f"{each.metric[:80]} must be finite")


def evaluation_of(work: Work, figures: EvaluationFigures) -> Evaluation:
    """Returns the evaluation that a piece of work is."""
    return Evaluation(work, msgspec.json.decode(work.order, type=EvaluationOrder), figures)


def order_json(order: EvaluationOrder) -> str:
    """Returns the JSON that `evaluation_of` reads."""
    return msgspec.json.encode(order).decode()
