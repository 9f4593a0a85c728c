"""When a canary's figures pass a bound."""

import pytest

from veneer_trainer.domain.adapters import RollbackPolicy
from veneer_trainer.domain.serving import ServingFigures, passed_bounds

GOOD = ServingFigures(100, 0, 200.0)


@pytest.mark.parametrize(
    ("policy", "canary", "production", "scores", "said"),
    [
        (RollbackPolicy(10), ServingFigures(0, 1000), GOOD, [0.0] * 99, []),  # nothing is bounded
        (RollbackPolicy(10, max_error_rate=0.1), ServingFigures(9, 1), GOOD, [], []),  # at the bound
        (RollbackPolicy(10, max_error_rate=0.1), ServingFigures(8, 2), GOOD, [], ["20.0% of 10 requests failed"]),
        (RollbackPolicy(11, max_error_rate=0.1), ServingFigures(8, 2), GOOD, [], []),  # too few yet
        (RollbackPolicy(10, max_error_rate=0.0), ServingFigures(0, 10), GOOD, [], ["100.0% of 10"]),
        (RollbackPolicy(10, max_latency_ratio=1.5), ServingFigures(10, 0, 300.0), GOOD, [], []),
        (RollbackPolicy(10, max_latency_ratio=1.5), ServingFigures(10, 0, 301.0), GOOD, [], ["301 ms is 1.50 times"]),
        (RollbackPolicy(11, max_latency_ratio=1.5), ServingFigures(10, 5, 900.0), GOOD, [], []),
        (RollbackPolicy(10, max_latency_ratio=1.5), ServingFigures(10, 0, 900.0), ServingFigures(9, 5, 1.0), [], []),
        (RollbackPolicy(3, min_judgement=0.5), GOOD, GOOD, [0.5, 0.5, 0.5], []),
        (RollbackPolicy(3, min_judgement=0.5), GOOD, GOOD, [0.0, 1.0, 0.4], ["judged 3 answers 0.47"]),
        (RollbackPolicy(4, min_judgement=0.5), GOOD, GOOD, [0.0, 0.0, 0.0], []),
        (
            RollbackPolicy(3, 0.1, 1.5, 0.5), ServingFigures(50, 50, 900.0), GOOD, [0.0] * 3,
            ["50.0% of 100", "4.50 times production's 200 ms", "judged 3 answers 0.00"],
        ),
    ],
)  # fmt: skip
def test_a_bound_that_is_passed_is_told_with_its_figures(
    policy: RollbackPolicy, canary: ServingFigures, production: ServingFigures, scores: list[float], said: list[str]
) -> None:
    passed = passed_bounds(policy, canary, production, scores)
    assert len(passed) == len(said)
    assert all(words in text for words, text in zip(said, passed, strict=True))


def test_latencies_of_reports_weigh_by_their_answers() -> None:
    total = ServingFigures(30, 1, 100.0) + ServingFigures(10, 0, 300.0) + ServingFigures(0, 5, 0.0)
    assert total == ServingFigures(40, 6, 150.0)
    assert ServingFigures() + ServingFigures(0, 2) == ServingFigures(0, 2)
