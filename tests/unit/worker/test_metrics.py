"""Scores of answers and their intervals."""

import json

import pytest

from veneer_trainer.worker.metrics import EXACT, FIELDS, Tally, scores

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


def test_a_tally_goes_on_from_what_was_stored() -> None:
    whole, first = Tally(), Tally()
    for number in range(30):
        whole.add({EXACT: (number % 3 == 0, 1)})
        if number < 17:
            first.add({EXACT: (number % 3 == 0, 1)})
    rest = Tally(first.metrics())
    for number in range(17, 30):
        rest.add({EXACT: (number % 3 == 0, 1)})
    assert rest.metrics() == whole.metrics()
    (metric,) = whole.metrics()
    assert (metric.value, metric.count) == (pytest.approx(1 / 3), 30)
    assert (metric.low, metric.high) == (pytest.approx(0.192, abs=0.001), pytest.approx(0.512, abs=0.001))


def test_shares_of_nothing_and_all_keep_their_interval_within_bounds() -> None:
    for right in (0, 5):
        tally = Tally()
        tally.add({EXACT: (right, 5)})
        (metric,) = tally.metrics()
        assert 0 <= metric.low <= metric.value <= metric.high <= 1
        assert metric.low < metric.high
