"""Guesses at what an answer says next: what followed the same few tokens before. Without torch.

Owns n-gram speculation's memory (the idea of prompt lookup and of https://arxiv.org/abs/2304.04487): a step computes
the next token and the guesses after it in one pass, and keeps those that it would have chosen anyway. Guesses come from
the sequence itself, and from earlier answers of the same tenant's same adapter, which often answers in one form.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

NGRAM = 3
_GAP = -1  # no token: what stands on its two sides never followed one another
_ANSWERS = 64  # tenants' adapters that are remembered
_ANSWER_TOKENS = 8192  # of each


class Continuations:
    """Tokens, and where each `NGRAM` of them last stood."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._place: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, tokens: Iterable[int]) -> None:
        """Takes the tokens that come next."""
        for token in tokens:
            before = tuple(self._tokens[-NGRAM:])
            if len(before) == NGRAM and _GAP not in before:
                self._place[before] = len(self._tokens)
            self._tokens.append(token)

    def gap(self) -> None:
        """What is added from now on does not follow what is there."""
        self._tokens.append(_GAP)

    def after(self, last: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the last `NGRAM` of `last`."""
        place = self._place.get(tuple(last[-NGRAM:]))
        if place is None:
            return []
        found = self._tokens[place : place + most]
        return found[: found.index(_GAP)] if _GAP in found else found


class Answers:
    """Continuations in earlier answers, by tenant and adapter; those used longest ago are forgotten first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[tuple[str, str], Continuations] = OrderedDict()

    def of(self, tenant: str, adapter: str) -> Continuations | None:
        """What this tenant's adapter has answered; None where nothing is known."""
        return self._answers.get((tenant, adapter))

    def add(self, tenant: str, adapter: str, answer: Sequence[int]) -> None:
        """Remembers an answer, given with the `NGRAM` tokens before it."""
        known = self._answers.pop((tenant, adapter), None)
        if known is None or len(known) + len(answer) > _ANSWER_TOKENS:
            known = Continuations()
        self._answers[tenant, adapter] = known
        known.gap()
        known.add(answer[:_ANSWER_TOKENS])
        if len(self._answers) > _ANSWERS:
            self._answers.popitem(last=False)
