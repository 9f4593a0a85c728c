"""Whether a difference between two evaluations is larger than chance."""

import random
import statistics
from collections.abc import Callable, Sequence

import pytest

from veneer.trainer.v1.evaluation_pb2 import Evaluation, Metric, Sample
from veneer_client import NotComparable, _comparison
from veneer_client._comparison import Difference, compare, mcnemar

ONE, OTHER = Evaluation(name="evaluations/a"), Evaluation(name="evaluations/b")


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_comparison, "_resamples", lambda rows: 400)


def samples(metric: str, values: Sequence[float], counts: Sequence[int] | None = None) -> list[Sample]:
    counts = counts or [1] * len(values)
    return [
        Sample(index=index, row_digest=str(index), metrics=[Metric(metric=metric, value=value, count=count)])
        for index, (value, count) in enumerate(zip(values, counts, strict=True))
    ]


def difference(metric: str, before: Sequence[float], after: Sequence[float]) -> Difference:
    (found,) = compare(ONE, OTHER, samples(metric, before), samples(metric, after)).differences
    return found


@pytest.mark.parametrize(
    ("before", "after", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (6, 0, 0.03125), (1, 16, 36 / 2**17), (400, 500, 0.000948)],
)
def test_mcnemars_exact_p(before: int, after: int, p_value: float) -> None:
    assert mcnemar(before, after) == pytest.approx(p_value, rel=0.01)
    assert mcnemar(before, after) == mcnemar(after, before)


@pytest.mark.parametrize(
    ("metric", "draw"),
    [("exact_match", lambda chance: float(chance.random() < 0.7)), ("anls", lambda chance: chance.random())],
)
def test_two_of_equal_skill_seldom_seem_to_differ(metric: str, draw: Callable[[random.Random], float]) -> None:
    chance = random.Random(1)  # noqa: S311  # the same draws each time
    seemed = 0
    for _ in range(100):
        before, after = ([draw(chance) for _ in range(60)] for _ in "ab")
        seemed += difference(metric, before, after).larger_than_chance
    assert seemed <= 10  # 5 % of 100 is 5


def test_a_small_gain_on_every_row_is_seen_through_rows_that_differ_much() -> None:
    """Unpaired, 0.02 would drown in a spread of 0.3."""
    chance = random.Random(2)  # noqa: S311  # likewise
    before = [chance.uniform(0, 0.9) for _ in range(80)]
    gain = difference("anls", before, [value + chance.uniform(0, 0.04) for value in before])
    assert gain.verdict == "better"
    assert 0 < gain.low < gain.difference < gain.high < 0.04
    loss = difference("cer", before, [value + chance.uniform(0, 0.04) for value in before])
    assert (loss.verdict, loss.only_before, loss.only_after) == ("worse", 80, 0)


def test_a_difference_has_the_interval_of_its_mean_and_never_no_chance_at_all() -> None:
    chance = random.Random(3)  # noqa: S311  # likewise
    gains = [chance.uniform(0.1, 0.5) for _ in range(100)]
    found = difference("anls", [0.3] * 100, [0.3 + gain for gain in gains])
    reach = 1.96 * statistics.stdev(gains) / 10
    assert found.difference - found.low == pytest.approx(reach, rel=0.2)
    assert found.high - found.difference == pytest.approx(reach, rel=0.2)
    assert found.p_value == pytest.approx(1 / 401)


def test_mcnemar_judges_what_is_right_or_wrong_alone() -> None:
    def test_of(values: Sequence[float], counts: Sequence[int]) -> str:
        return compare(ONE, OTHER, samples("m", values, counts), samples("m", [1.0, 1.0], counts)).differences[0].test

    assert test_of([0.0, 1.0], [1, 1]) == "McNemar"
    assert test_of([0.5, 1.0], [1, 1]) == test_of([0.0, 1.0], [3, 1]) == "paired randomisation"


def test_figures_weigh_rows_by_their_size() -> None:
    before = samples("field_match", [1.0, 0.0], [9, 1])
    after = samples("field_match", [0.0, 1.0], [9, 1])
    (found,) = compare(ONE, OTHER, before, after).differences
    assert (found.before, found.after) == (pytest.approx(0.9), pytest.approx(0.1))
    assert (found.only_before, found.only_after) == (1, 1)


def test_rows_are_paired_by_digest_and_only_shared_ones_count() -> None:
    before, after = samples("exact_match", [1, 0, 1, 0]), samples("exact_match", [1, 1, 0, 0])
    for sample, digest in zip(before, "aabc", strict=True):
        sample.row_digest = digest
    for sample, digest in zip(after, "baad", strict=True):
        sample.row_digest = digest
    found = compare(ONE, OTHER, before, after)
    assert [(old.index, new.index) for old, new in found.pairs] == [(2, 0), (0, 1), (1, 2)]
    with pytest.raises(NotComparable, match="no metric"):
        compare(ONE, OTHER, samples("cer", [1.0]), samples("anls", [1.0]))
