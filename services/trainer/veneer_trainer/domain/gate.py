"""The gate of a promotion: figures of a version's evaluations, held against numbers and other aliases.

`exact_match >= 0.9 and exact_match >= production`: comparisons joined by `and`. A figure on the left is the newest
that a succeeded evaluation of the version has; an alias on the right stands for the same figure of the version that
it points at, on the same rows.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from veneer_rpc.errors import FailedPrecondition, Violation, invalid
from veneer_trainer.domain.adapters import ALIAS

_MAX_CHARS = 1024
_COMPARISON = re.compile(r"\s*([a-z][a-z0-9_]*(?:/[^\s<>=!]{1,100})?)\s*(>=|<=|>|<|==)\s*([a-z0-9.+-]+)\s*")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """One condition: a metric, an operator, and a number or an alias."""

    metric: str
    operator: str
    bound: float | str


Figures = Callable[[str, str], tuple[float | None, float | None]]
"""Given a metric and an alias (empty for none): the version's figure and the alias's, None where there is none."""


def parse(text: str) -> tuple[Comparison, ...]:
    """Reads a gate; an empty text is none.

    Raises:
        InvalidArgument: it is not of the form above.
    """
    if not text.strip():
        return ()
    comparisons = []
    for part in re.split(r"\s+and\s+", text.strip()) if len(text) <= _MAX_CHARS else [text]:
        match = _COMPARISON.fullmatch(part)
        bound = None if match is None else _bound(match[3])
        if match is None or bound is None:
            example = "exact_match >= 0.9 and exact_match >= production"
            raise invalid(Violation("condition", "INVALID_GATE", f"must be such as {example!r}, was {part[:80]!r}"))
        comparisons.append(Comparison(match[1], match[2], bound))
    return tuple(comparisons)


def check(comparisons: tuple[Comparison, ...], figures: Figures) -> None:
    """Lets a promotion pass.

    Raises:
        FailedPrecondition: GATE_NOT_MET, with the figures of every comparison that does not hold.
    """
    failed = []
    for each in comparisons:
        alias = each.bound if isinstance(each.bound, str) else ""
        mine, theirs = figures(each.metric, alias)
        bound = theirs if isinstance(each.bound, str) else each.bound
        if mine is None:
            failed.append(f"no succeeded evaluation has {each.metric}")
        elif bound is None:
            failed.append(f"{alias} has no {each.metric} on the same rows")
        elif not _OPERATORS[each.operator](mine, bound):
            shown = f"{alias} ({bound:g})" if alias else f"{bound:g}"
            failed.append(f"{each.metric} is {mine:g}, which is not {each.operator} {shown}")
    if failed:
        raise FailedPrecondition("GATE_NOT_MET", f"the gate does not hold: {'; '.join(failed)}")


def _bound(text: str) -> float | str | None:
    try:
        number = float(text)
    except ValueError:
        return text if ALIAS.fullmatch(text) else None
    return number if math.isfinite(number) else None
