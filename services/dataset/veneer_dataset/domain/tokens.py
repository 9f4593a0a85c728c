"""Tokens of canonical rows under a model's processing contract; how they are counted is processing's."""

import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from veneer_dataset.domain.report import TokenTotals
from veneer_processing import (
    Conversation,
    ConversationError,
    Message,
    Part,
    Picture,
    PictureError,
    Processor,
    Text,
    TokenCounts,
)

NEAR_CONTEXT = 0.9
FIRST_BUCKET_TOKENS = 64

PictureSize = Callable[[str], tuple[int, int]]
"""From a picture's digest to its upright width and height, in pixels."""


@dataclass(frozen=True, slots=True)
class Counting:
    """What counts tokens: a model's processor under the wanted bound, and the model's context in tokens."""

    model: str
    contract_digest: str
    processor: Processor
    context_length: int


@dataclass(frozen=True, slots=True)
class Uncountable:
    """Why a row cannot be given to the model."""

    code: str
    found: str


def count_rows(
    counting: Counting, rows: Sequence[dict[str, Any]], size_of: PictureSize
) -> list[TokenCounts | Uncountable]:
    """Tokens of each canonical row."""
    conversations = [conversation_of(row, size_of) for row in rows]
    try:
        return list(counting.processor.count(conversations))
    except (ConversationError, PictureError):
        return [_count_one(counting, each) for each in conversations]


def length_finding(counting: Counting, tokens: int) -> tuple[str, str] | None:
    """Code and finding of a row too long for the model's context, or nearly."""
    found = f"{tokens} tokens, the context is {counting.context_length}"
    if tokens > counting.context_length:
        return "ROW_OVER_CONTEXT", found
    return ("ROW_NEAR_CONTEXT", found) if tokens >= NEAR_CONTEXT * counting.context_length else None


def conversation_of(row: dict[str, Any], size_of: PictureSize) -> Conversation:
    """A canonical row as processing reads it, its pictures by their size alone."""
    return Conversation(
        tuple(
            [
                Message(
                    message["role"],
                    tuple([_part(part, size_of) for part in message["content"]]),
                    "weight" not in message,
                )
                for message in row["messages"]
            ]
        )
    )


class TokenColumns:
    """Tokens of many rows, twelve bytes a row."""

    def __init__(self) -> None:
        self._visual, self._prompt, self._supervised = array("I"), array("I"), array("I")

    def add(self, counts: TokenCounts) -> None:
        """Adds a row."""
        self._visual.append(counts.visual)
        self._prompt.append(counts.prompt)
        self._supervised.append(counts.supervised)

    def totals(self, chosen: Sequence[bool]) -> TokenTotals:
        """Sums over the rows that are chosen."""
        visual, prompt, supervised = (
            array("I", itertools.compress(column, chosen)) for column in (self._visual, self._prompt, self._supervised)
        )
        longest = max(map(sum, zip(visual, prompt, supervised, strict=True)), default=0)
        return TokenTotals(sum(visual), sum(prompt), sum(supervised), longest)

    def histogram(self) -> list[tuple[int, int]]:
        """(Least length, rows) of each bucket with rows in it; bounds double from FIRST_BUCKET_TOKENS."""
        buckets: Counter[int] = Counter()
        for lengths in zip(self._visual, self._prompt, self._supervised, strict=True):
            doublings = (sum(lengths) // FIRST_BUCKET_TOKENS).bit_length()
            buckets[FIRST_BUCKET_TOKENS << doublings >> 1 if doublings else 0] += 1
        return sorted(buckets.items())


def _part(part: dict[str, str], size_of: PictureSize) -> Part:
    if part["type"] == "text":
        return Text(part["text"])
    return Picture(part["digest"], *size_of(part["digest"]))


def _count_one(counting: Counting, conversation: Conversation) -> TokenCounts | Uncountable:
    try:
        return counting.processor.count([conversation])[0]
    except ConversationError as error:
        return Uncountable("TEXT_CONTROL_TOKEN", str(error))
    except PictureError as error:
        return Uncountable("PICTURE_TOO_THIN", str(error))
