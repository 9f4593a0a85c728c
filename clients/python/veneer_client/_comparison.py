"""Two evaluations on the same rows: the paired difference of each metric, and whether it is larger than chance.

Where each sample is right or wrong, chance is judged by McNemar's exact test: of the samples that only one of the two
has right, were each as likely to have them (McNemar 1947, https://doi.org/10.1007/BF02295996)? Elsewhere by paired
randomisation: how often is the difference as large when, row by row, a coin says whose answer is whose (Noreen 1989,
Computer-Intensive Methods for Testing Hypotheses)? Riezler and Maxwell (2005, https://aclanthology.org/W05-0908) find
that it calls fewer equal systems different than a bootstrap does. Both at 5 %. Intervals of differences are of a paired
bootstrap (Koehn 2004, https://aclanthology.org/W04-3250).
"""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from veneer.trainer.v1.evaluation_pb2 import Evaluation, Metric, Sample
from veneer_client._errors import NotComparable

LEVEL = 0.05
_RESAMPLES = 2000
_ROUNDING = 1e-12
_LOWER_IS_BETTER = {"cer"}

Pair = tuple[Sample, Sample]


@dataclass(frozen=True, slots=True)
class Difference:
    """What a metric gained from the earlier evaluation to the later one, over the rows of both.

    Attributes:
        metric: its name.
        before: the earlier figure, a micro-average over the shared rows.
        after: the later figure.
        low: lower end of the 95 % confidence interval of the difference.
        high: its upper end.
        p_value: how likely chance alone makes a difference at least as large.
        test: `McNemar` or `paired randomisation`.
        only_before: rows that the earlier one has better.
        only_after: rows that the later one has better.
    """

    metric: str
    before: float
    after: float
    low: float
    high: float
    p_value: float
    test: str
    only_before: int
    only_after: int

    @property
    def difference(self) -> float:
        """Later minus earlier; of `cer` a fall is the gain."""
        return self.after - self.before

    @property
    def larger_than_chance(self) -> bool:
        """True when chance is unlikely to have made it."""
        return self.p_value < LEVEL

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `no clear difference`."""
        if not self.larger_than_chance:
            return "no clear difference"
        return "better" if (self.difference < 0) == (self.metric in _LOWER_IS_BETTER) else "worse"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two evaluations, their shared rows with both answers, and the differences."""

    before: Evaluation
    after: Evaluation
    pairs: tuple[Pair, ...]
    differences: tuple[Difference, ...]


def compare(
    before: Evaluation, after: Evaluation, samples_before: Iterable[Sample], samples_after: Iterable[Sample]
) -> Comparison:
    """Compares two evaluations.

    Raises:
        NotComparable: they asked different things, or share no row or no metric.
    """
    if before.spec.prompt != after.spec.prompt:
        raise NotComparable(f"{before.name} and {after.name} asked with different prompts")
    pairs = _paired(samples_before, samples_after)
    if not pairs:
        raise NotComparable(f"{before.name} and {after.name} share no answered row")
    figures = [({m.metric: m for m in old.metrics}, {m.metric: m for m in new.metrics}) for old, new in pairs]
    names = [metric.metric for metric in pairs[0][0].metrics]
    shared = [name for name in names if all(name in old and name in new for old, new in figures)]
    if not shared:
        raise NotComparable(f"{before.name} and {after.name} share no metric: evaluate both with the same --metric")
    drawn = random.Random(0)  # noqa: S311  # the same samples give the same figures
    rows, times = range(len(pairs)), range(_resamples(len(pairs)))
    draws = _Draws(
        [drawn.choices(rows, k=len(pairs)) for _ in times], [drawn.choices((True, False), k=len(pairs)) for _ in times]
    )
    differences = [_difference(name, [(old[name], new[name]) for old, new in figures], draws) for name in shared]
    return Comparison(before, after, tuple(pairs), tuple(differences))


@dataclass(frozen=True, slots=True)
class _Draws:
    """What chance drew, the same for every metric: rows with replacement, and whose answers change places."""

    rows: Sequence[Sequence[int]]
    swapped: Sequence[Sequence[bool]]


def mcnemar(only_before: int, only_after: int) -> float:
    """Returns the two-sided exact p-value for so many samples that only one of the two has right."""
    trials, fewer = only_before + only_after, min(only_before, only_after)
    tail = sum(math.comb(trials, successes) for successes in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << trials))


def _resamples(rows: int) -> int:
    """Fewer for many rows, whose intervals are steadier: about as much work at any size."""
    return max(400, min(_RESAMPLES, 2_000_000 // rows))


def _paired(before: Iterable[Sample], after: Iterable[Sample]) -> list[Pair]:
    """Samples of the same row; a row that occurs twice is paired in order."""
    waiting: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in before:
        waiting[sample.row_digest].append(sample)
    return [(waiting[sample.row_digest].pop(0), sample) for sample in after if waiting[sample.row_digest]]


def _difference(metric: str, pairs: Sequence[tuple[Metric, Metric]], draws: _Draws) -> Difference:
    columns: list[list[float]] = [[each.value * each.count for each, _ in pairs], [each.count for each, _ in pairs]]
    columns += [[each.value * each.count for _, each in pairs], [each.count for _, each in pairs]]
    wrong, of, right, among = (math.fsum(column) for column in columns)
    before, after = wrong / of, right / among
    better = [new.value - old.value for old, new in pairs]
    if metric in _LOWER_IS_BETTER:
        better = [-each for each in better]
    only_before, only_after = sum(each < 0 for each in better), sum(each > 0 for each in better)
    drawn = []
    for rows in draws.rows:
        sums = [sum(map(column.__getitem__, rows)) for column in columns]
        drawn.append(sums[2] / sums[3] - sums[0] / sums[1])
    drawn.sort()
    reach = round(len(drawn) * LEVEL / 2)
    if all(each.count == 1 and each.value in (0, 1) for each in itertools.chain.from_iterable(pairs)):
        test, p_value = "McNemar", mcnemar(only_before, only_after)
    else:
        test, as_large = "paired randomisation", 0
        gains = [new - old for old, new in zip(columns[0], columns[2], strict=True)]
        sizes = [new - old for old, new in zip(columns[1], columns[3], strict=True)]
        for swapped in draws.swapped:
            gain, size = sum(itertools.compress(gains, swapped)), sum(itertools.compress(sizes, swapped))
            chance = (right - gain) / (among - size) - (wrong + gain) / (of + size)
            as_large += abs(chance) >= abs(after - before) - _ROUNDING
        p_value = (as_large + 1) / (len(draws.swapped) + 1)
    return Difference(metric, before, after, drawn[reach], drawn[-1 - reach], p_value, test, only_before, only_after)
