"""How a version's requests went, and whether a canary's figures pass a bound of its policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer_trainer.domain.adapters import RollbackPolicy


@dataclass(frozen=True, slots=True)
class ServingFigures:
    """How a version's requests went; latency is the answered-weighted mean of the reports' 95th percentiles."""

    answered: int = 0
    failed: int = 0
    latency_p95_ms: float = 0.0

    @property
    def requests(self) -> int:
        """Answered and failed."""
        return self.answered + self.failed

    def __add__(self, more: ServingFigures) -> ServingFigures:
        answered = self.answered + more.answered
        total_ms = self.answered * self.latency_p95_ms + more.answered * more.latency_p95_ms
        return ServingFigures(answered, self.failed + more.failed, total_ms / answered if answered else 0.0)


def passed_bounds(
    policy: RollbackPolicy, canary: ServingFigures, production: ServingFigures, scores: Sequence[float]
) -> list[str]:
    """Returns the bounds that are passed, in words with the figures.

    Each is judged from `policy.min_answers` on: requests of the canary for errors, answers of both for latency,
    judged answers for judgements.

    Args:
        policy: the bounds.
        canary: its figures.
        production: figures of the version it is compared with.
        scores: people's judgements of the canary, each 0-1.
    """
    passed, least = [], policy.min_answers
    if policy.max_error_rate is not None and canary.requests >= least:
        rate = canary.failed / canary.requests
        if rate > policy.max_error_rate:
            passed.append(f"{rate:.1%} of {canary.requests} requests failed, bound {policy.max_error_rate:.1%}")
    if policy.max_latency_ratio is not None and min(canary.answered, production.answered) >= least:
        ratio = canary.latency_p95_ms / production.latency_p95_ms if production.latency_p95_ms else 1.0
        if ratio > policy.max_latency_ratio:
            passed.append(
                f"latency (p95) {canary.latency_p95_ms:.0f} ms is {ratio:.2f} times production's "
                f"{production.latency_p95_ms:.0f} ms, bound {policy.max_latency_ratio:g}"
            )
    if policy.min_judgement is not None and len(scores) >= least:
        mean = sum(scores) / len(scores)
        if mean < policy.min_judgement:
            passed.append(f"people judged {len(scores)} answers {mean:.2f}, bound {policy.min_judgement:g}")
    return passed
