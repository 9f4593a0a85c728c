"""Scores of answers, and what they come to over all samples. Texts are compared in Unicode NFC, trimmed.

`exact_match`: the answer is the expected text.
`cer`: character errors: edits from the expected text to the answer (Levenshtein 1966) per expected character.
`anls`: similarity of the texts, case aside, below one half taken for none (Biten et al. 2019, arXiv:1905.13648).
`rouge_l`: F-measure of the longest common subsequence of words (Lin 2004, https://aclanthology.org/W04-1013); a Han
character, kana or hangul syllable is a word of its own.
`field_match`: where the expected text is a JSON object, the share of its fields that the answer, read as JSON too, has
with an equal value; an answer that is no JSON object has none.
`field_f1`: as that, over all nested fields of both, in any order, with what was made up counted against the answer
(the field-level F1 of Kim et al. 2022, arXiv:2111.15664).
Under both, an expected text that is anything else counts as one field, equal where the answer matches exactly.

Figures are micro-averages: a sample with more fields or characters weighs more.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq, Levenshtein

from veneer.trainer.v1 import evaluation_pb2
from veneer_trainer.domain.evaluations import METRICS

EXACT, FIELDS = "exact_match", "field_match"
_Z = 1.959964  # of the normal distribution's middle 95 %
_TAILS = (2.5, 97.5)  # percentiles that the middle 95 % lie between
_RESAMPLES = 1000
_MOST_FIELDS = 100  # that get a figure of their own
_LEAST_SIMILAR = 0.5  # of ANLS
_WORD = re.compile(r"[㐀-鿿豈-﫿぀-ヿ가-힯]|[^\W㐀-鿿豈-﫿぀-ヿ가-힯]+")

Scores = dict[str, tuple[float, int]]
"""By metric, the sum of what was right (of edits, for `cer`), and of how many."""


def fields_of(text: str) -> Mapping[str, Any] | None:
    """Returns the fields of an answer; None where it is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def scores(expected: str, answer: str, metrics: Iterable[str]) -> Scores:
    """Returns a sample's scores under the metrics named; of each field too, under `field_match`.

    Args:
        expected: the row's answer.
        answer: what came; empty where nothing came.
        metrics: some of METRICS.
    """
    wanted, given = _plain(expected), _plain(answer)
    return {name: score for metric in metrics for name, score in _SCORERS[metric](wanted, given).items()}


class Tally:
    """Scores over samples, with 95 % confidence intervals.

    Where each sample is one trial (`exact_match`, one field) the interval is Wilson's (1927,
    https://doi.org/10.1080/01621459.1927.10502953). Elsewhere whole samples are drawn again, since the fields and
    characters of one answer fail together: a bootstrap in one pass, in which each sample has a weight of mean 1 from
    Poisson's distribution in each resample (Chamandy et al. 2012, https://research.google/pubs/pub43157/).
    The same samples in the same order give the same figures.
    """

    def __init__(self) -> None:
        self._samples = 0
        self._totals: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}

    def add(self, found: Scores) -> None:
        """Adds a sample's scores; of fields by their own name, the first hundred names."""
        drawn = np.random.default_rng(self._samples).poisson(1.0, _RESAMPLES)
        weights = np.concatenate(([1.0], drawn))  # in front the samples as they are
        self._samples += 1
        for metric, score in found.items():
            if metric not in self._totals and len(self._totals) >= _MOST_FIELDS:
                continue
            totals = self._totals.setdefault(metric, np.zeros((2, 1 + _RESAMPLES)))
            totals += np.outer(score, weights)

    def metrics(self) -> list[evaluation_pb2.Metric]:
        """Returns the figures over all samples so far, by name."""
        return [self._figure(metric, totals) for metric, totals in sorted(self._totals.items())]

    def _figure(self, metric: str, totals: np.ndarray[Any, np.dtype[np.float64]]) -> evaluation_pb2.Metric:
        total, count = totals[0, 0], int(totals[1, 0])
        value = total / count
        if metric == EXACT or metric.startswith(f"{FIELDS}/"):
            low, high = wilson(value, count)
        else:
            drawn = totals[:, 1:][:, totals[1, 1:] > 0]
            low, high = np.percentile(drawn[0] / drawn[1], _TAILS) if drawn.size else (value, value)
            if low == high and value in (0, 1):  # all alike: what was not drawn is not impossible
                low, high = wilson(value, self._samples)
        low, high = min(low, value), max(high, value)
        return evaluation_pb2.Metric(metric=metric, value=value, low=low, high=high, count=count)


def sample_figures(found: Scores, metrics: Iterable[str]) -> list[evaluation_pb2.Metric]:
    """Returns one sample's figures under the metrics named; one answer has no interval."""
    shares = {metric: found[metric][0] / found[metric][1] for metric in metrics}
    return [
        evaluation_pb2.Metric(metric=metric, value=share, low=share, high=share, count=found[metric][1])
        for metric, share in shares.items()
    ]


def wilson(share: float, count: int) -> tuple[float, float]:
    """Returns the ends of Wilson's 95 % interval of a share over `count` trials."""
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    reach = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _exact_match(expected: str, answer: str) -> Scores:
    return {EXACT: (int(answer == expected), 1)}


def _cer(expected: str, answer: str) -> Scores:
    return {"cer": (Levenshtein.distance(expected, answer), max(len(expected), 1))}


def _anls(expected: str, answer: str) -> Scores:
    alike = Levenshtein.normalized_similarity(expected.casefold(), answer.casefold())
    return {"anls": (alike if alike >= _LEAST_SIMILAR else 0.0, 1)}


def _rouge_l(expected: str, answer: str) -> Scores:
    wanted, given = _WORD.findall(expected.casefold()), _WORD.findall(answer.casefold())
    if not wanted or not given:  # no words: signs alone, which match or do not
        return {"rouge_l": (int(expected == answer), 1)}
    return {"rouge_l": (2 * LCSseq.similarity(wanted, given) / (len(wanted) + len(given)), 1)}


def _field_match(expected: str, answer: str) -> Scores:
    if (wanted := fields_of(expected)) is None:
        return {FIELDS: (int(answer == expected), 1)}
    given = fields_of(answer) or {}
    right = {name: name in given and _equal(value, given[name]) for name, value in wanted.items()}
    each: Scores = {f"{FIELDS}/{name}": (int(is_right), 1) for name, is_right in right.items()}
    return {FIELDS: (sum(right.values()), len(right))} | each if right else {FIELDS: (int(answer == expected), 1)}


def _field_f1(expected: str, answer: str) -> Scores:
    if not (wanted := fields_of(expected)):
        return {"field_f1": (int(answer == expected), 1)}
    ours, theirs = Counter(_leaves(wanted)), Counter(_leaves(fields_of(answer) or {}))
    return {"field_f1": (2 * (ours & theirs).total(), ours.total() + theirs.total())}


def _leaves(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Places and values of what is no object or list with something in it; items of a list share their place."""
    if isinstance(value, dict) and (value or not place):
        for name, each in value.items():
            yield from _leaves(each, f"{place}/{name}")
    elif isinstance(value, list) and value:
        for each in value:
            yield from _leaves(each, f"{place}/*")
    else:
        yield place, json.dumps(_plain(value) if isinstance(value, str) else value, sort_keys=True)


_SCORERS: dict[str, Callable[[str, str], Scores]] = {
    EXACT: _exact_match, FIELDS: _field_match, "field_f1": _field_f1, "cer": _cer, "anls": _anls, "rouge_l": _rouge_l,
}  # fmt: skip
assert set(_SCORERS) == set(METRICS)  # noqa: S101  # what the trainer accepts, a worker computes


def _equal(expected: object, given: object) -> bool:
    if isinstance(expected, str) and isinstance(given, str):
        return _plain(expected) == _plain(given)
    return type(expected) is type(given) and expected == given


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()
