"""Scores of answers and their intervals."""

import json

import numpy as np
import pytest

from veneer_trainer.domain.evaluations import METRICS
from veneer_trainer.worker.metrics import EXACT, FIELDS, Tally, sample_figures, scores

BOTH = (EXACT, FIELDS)


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("7", "7", 1),
        ("7", " 7\n", 1),
        ("7", "17", 0),
        ("caf\u00e9", "cafe\u0301", 1),
        ("", "", 1),
        ("A", "a", 0),
    ],
)
def test_exact_match(expected: str, answer: str, right: int) -> None:
    assert scores(expected, answer, BOTH) == {EXACT: (right, 1), FIELDS: (right, 1)}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ({"amount": "¥8,650", "date": "2024年3月15日", "days": 3}, 3),
        ({"days": 3, "date": " 2024年3月15日", "amount": "¥8,650", "more": 1}, 3),
        ({"amount": "¥8,650", "date": "2024年3月16日", "days": "3"}, 1),
        ({"days": True}, 0),
        (["amount"], 0),
        ("no JSON", 0),
    ],
)
def test_field_match(answer: object, right: int) -> None:
    expected = json.dumps({"amount": "¥8,650", "date": "2024年3月15日", "days": 3}, ensure_ascii=False)
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    found = scores(expected, text, [FIELDS])
    assert found[FIELDS] == (right, 3)
    assert sum(found[f"{FIELDS}/{name}"][0] for name in ("amount", "date", "days")) == right


@pytest.mark.parametrize(
    ("metric", "expected", "answer", "score"),
    [
        ("cer", "\u4e00\u4e8c\u4e09", "\u4e00\u4e8c", (1, 3)),
        ("cer", "kitten", "sitting", (3, 6)),
        ("cer", "", "ab", (2, 1)),
        ("cer", "ab", "", (2, 2)),
        ("anls", "Hello", "hello", (1, 1)),
        ("anls", "hello", "hellp", (0.8, 1)),
        ("anls", "hello", "world", (0, 1)),
        ("rouge_l", "the cat sat on the mat", "the cat on a mat", (8 / 11, 1)),
        ("rouge_l", "\u91d1\u989d\u662f 5 \u5143", "\u91d1\u989d 5 \u5143", (8 / 9, 1)),
        ("rouge_l", "!", "!", (1, 1)),
        ("rouge_l", "a", "!", (0, 1)),
        ("field_f1", '{"a": 1, "b": {"c": ["x", "y"]}}', '{"b": {"c": ["y", "x"]}, "a": 1}', (6, 6)),
        ("field_f1", '{"a": 1, "b": "x"}', '{"a": 1, "c": "x"}', (2, 4)),
        ("field_f1", '{"a": 1}', '{"a": 1, "b": 2, "c": 3}', (2, 4)),
        ("field_f1", '{"a": 1}', '{"a": true}', (0, 2)),
        ("field_f1", '{"a": 1, "b": 2}', "none", (0, 2)),
        ("field_f1", "plain", "plain", (1, 1)),
        ("field_f1", "{}", "{}", (1, 1)),
        ("field_match", "{}", "{}", (1, 1)),
    ],
)
def test_scores_by_hand(metric: str, expected: str, answer: str, score: tuple[float, int]) -> None:
    assert scores(expected, answer, [metric])[metric] == pytest.approx(score)


def test_every_metric_that_may_be_asked_for_is_computed() -> None:
    found = scores('{"a": "b"}', '{"a": "b"}', METRICS)
    assert set(METRICS) <= set(found)
    assert {each.metric: each.value for each in sample_figures(found, METRICS)} == {
        metric: 0.0 if metric == "cer" else 1.0 for metric in METRICS
    }


def test_a_tally_is_the_same_whenever_it_is_asked() -> None:
    whole, halves = Tally(), Tally()
    for number in range(30):
        found = scores("abcdef", "abcdef"[: number % 7], METRICS)
        whole.add(found)
        halves.add(found)
        halves.metrics()
    assert halves.metrics() == whole.metrics()


def test_yes_or_no_has_wilsons_interval() -> None:
    tally = Tally()
    for number in range(30):
        tally.add({EXACT: (number % 3 == 0, 1)})
    (metric,) = tally.metrics()
    assert (metric.value, metric.count) == (pytest.approx(1 / 3), 30)
    assert (metric.low, metric.high) == (pytest.approx(0.192, abs=0.001), pytest.approx(0.512, abs=0.001))


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).uniform(size=400)
    tally = Tally()
    for value in values:
        tally.add({"anls": (float(value), 1)})
    (metric,) = tally.metrics()
    reach = 1.96 * values.std() / 20
    assert metric.value == pytest.approx(values.mean())
    assert metric.value - metric.low == pytest.approx(reach, rel=0.2)
    assert metric.high - metric.value == pytest.approx(reach, rel=0.2)


def test_fields_of_one_answer_are_drawn_together() -> None:
    """Ten fields that fail together say no more than one: the interval must not shrink by a factor of three."""
    lone, together = Tally(), Tally()
    for number in range(60):
        right = number % 2
        lone.add({FIELDS: (right, 1)})
        together.add({FIELDS: (10 * right, 10)})
    (one,), (ten,) = lone.metrics(), together.metrics()
    assert ten.high - ten.low == pytest.approx(one.high - one.low)


@pytest.mark.parametrize("metric", [EXACT, FIELDS, f"{FIELDS}/date", "anls"])
def test_shares_of_nothing_and_all_keep_their_interval_within_bounds(metric: str) -> None:
    for right in (0, 1):
        tally = Tally()
        for _ in range(5):
            tally.add({metric: (right, 1)})
        (figure,) = tally.metrics()
        assert 0 <= figure.low <= figure.value <= figure.high <= 1
        assert figure.high - figure.low > 0.3
