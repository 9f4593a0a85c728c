"""Scores of answers.

`exact_match`: the answer is the expected text, after Unicode NFC (the form that the tokenizer reads) and without white
space at both ends. `field_match`: where the expected text is a JSON object, the share of its fields that the answer,
read as JSON too, has with an equal value; an answer that is no JSON object has none. Where the expected text is
anything else it counts as one field, equal where the answer matches exactly. Fields of all samples weigh the same.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from veneer.trainer.v1 import evaluation_pb2

EXACT, FIELDS = "exact_match", "field_match"
KNOWN = (EXACT, FIELDS)
_Z = 1.959964  # of the normal distribution's middle 95 %
_MOST_FIELDS = 100  # that get a figure of their own

Scores = dict[str, tuple[int, int]]
"""By metric, how many were right of how many."""


def fields_of(text: str) -> Mapping[str, Any] | None:
    """Returns the fields of an answer; None where it is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def scores(expected: str, answer: str, metrics: Iterable[str]) -> Scores:
    """Returns a sample's scores under the metrics named."""
    exact = _plain(answer) == _plain(expected)
    found: Scores = {}
    for metric in metrics:
        if metric == EXACT:
            found[EXACT] = (int(exact), 1)
        elif (wanted := fields_of(expected)) is None:
            found[FIELDS] = (int(exact), 1)
        else:
            given = fields_of(answer) or {}
            right = {name: name in given and _equal(value, given[name]) for name, value in wanted.items()}
            found[FIELDS] = (sum(right.values()), len(right))
            found |= {f"{FIELDS}/{name}": (int(is_right), 1) for name, is_right in right.items()}
    return found


class Tally:
    """Scores over samples; one that was broken off goes on from the figures that are stored.

    Args:
        metrics: the stored figures; empty for a beginning.
    """

    def __init__(self, metrics: Iterable[evaluation_pb2.Metric] = ()) -> None:
        self._totals: Scores = {each.metric: (round(each.value * each.count), each.count) for each in metrics}

    def add(self, found: Scores) -> None:
        """Adds a sample's scores; of fields by their own name, the first hundred names."""
        for metric, (right, count) in found.items():
            if metric not in self._totals and len(self._totals) >= _MOST_FIELDS:
                continue
            had_right, had = self._totals.get(metric, (0, 0))
            self._totals[metric] = (had_right + right, had + count)

    def metrics(self) -> list[evaluation_pb2.Metric]:
        """Returns the figures over all samples so far."""
        return figures(self._totals)


def figures(totals: Scores) -> list[evaluation_pb2.Metric]:
    """Returns shares with their intervals, by name."""
    return [_figure(metric, right, count) for metric, (right, count) in sorted(totals.items()) if count]


def _figure(metric: str, right: int, count: int) -> evaluation_pb2.Metric:
    """A share with Wilson's interval (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    share = right / count
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    reach = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return evaluation_pb2.Metric(metric=metric, value=share, low=min(low, share), high=max(high, share), count=count)


def _equal(expected: object, given: object) -> bool:
    if isinstance(expected, str) and isinstance(given, str):
        return _plain(expected) == _plain(given)
    return type(expected) is type(given) and expected == given


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()
