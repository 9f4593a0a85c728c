"""What the evaluations' domain needs of the world beside queued work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from veneer_trainer.domain.evaluations import EvaluationFigures, Judgement, Metric, Sample


class EvaluationStore(Protocol):
    """Samples, figures and judgements, durable when a method returns; inside `together` with the rest."""

    def put(
        self, uid: str, samples: Sequence[Sample], metrics: Sequence[Metric] | None, total: int
    ) -> EvaluationFigures:
        """Stores samples, replacing those of the same index; without metrics those before stay."""

    def figures(self, uid: str) -> EvaluationFigures:
        """Returns what there is so far."""

    def samples(self, uid: str, after: int, limit: int, only_misses: bool) -> list[Sample]:
        """Returns samples by index, with one greater than `after`."""

    def judge(self, tenant: str, judgement: Judgement) -> Judgement:
        """Records a verdict."""

    def judgement(self, uid: str) -> Judgement:
        """Returns a verdict."""

    def judgements(
        self, tenant: str, before: tuple[float, str] | None, limit: int, subject: str = ""
    ) -> list[Judgement]:
        """Returns verdicts, newest first, older than a (created_s, uid)."""
