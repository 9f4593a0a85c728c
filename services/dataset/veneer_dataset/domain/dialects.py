"""Dialects: how rows are written in JSON, told apart by their keys; one small reader for each."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from veneer_dataset.domain import messages, pairs, tagged
from veneer_dataset.domain.draft import Draft, split_name
from veneer_dataset.domain.findings import Refusal


class Dialect(IntEnum):
    """How a row, or a file of rows, is written."""

    NONE = 0
    PAIR = 1
    OPENAI = 2
    SWIFT = 3
    SHAREGPT = 4
    LLAVA = 5
    MIXED = 6


@dataclass(frozen=True, slots=True)
class _Form:
    read: Callable[[dict[str, Any], str], Draft]
    fields: frozenset[str]


_EVERYWHERE = ("split", "group")
_FORMS: dict[Dialect, _Form] = {
    Dialect.PAIR: _Form(pairs.read, frozenset({"image", "images", "text", "prompt", *_EVERYWHERE})),
    Dialect.OPENAI: _Form(messages.read, frozenset({"messages", *_EVERYWHERE})),
    Dialect.SWIFT: _Form(tagged.read_swift, frozenset({"messages", "images", *_EVERYWHERE})),
    Dialect.SHAREGPT: _Form(tagged.read_sharegpt, frozenset({"conversations", "images", "system", *_EVERYWHERE})),
    Dialect.LLAVA: _Form(tagged.read_llava, frozenset({"conversations", "image", *_EVERYWHERE})),
}


def dialect_of(row: dict[str, Any]) -> Dialect:
    """How a row is written.

    Raises:
        Refusal: in no known way.
    """
    if "messages" in row:
        return Dialect.SWIFT if "images" in row else Dialect.OPENAI
    if "conversations" in row:
        return Dialect.LLAVA if "image" in row else Dialect.SHAREGPT
    if "text" in row or "image" in row or "images" in row:
        return Dialect.PAIR
    raise Refusal("DIALECT_UNKNOWN", "$", ", ".join(row) or "no field")


def read_draft(row: dict[str, Any], dialect: Dialect, default_prompt: str) -> Draft:
    """Reads a row of a dialect.

    Args:
        row: the row as parsed.
        dialect: how it is written.
        default_prompt: the user's text of pairs that have none.

    Raises:
        Refusal: the row cannot be accepted.
    """
    draft = _FORMS[dialect].read(row, default_prompt)
    split = row.get("split")
    if split is not None:
        draft.split = split_name(split, "$.split")
    group = row.get("group")
    if group is not None:
        if type(group) is not str or not group:
            raise Refusal("FIELD_TYPE", "$.group", group)
        draft.group = group
    return draft


def unread_fields(row: dict[str, Any], dialect: Dialect) -> list[str]:
    """Fields of a row that its dialect's reader does not look at."""
    known = _FORMS[dialect].fields
    return [] if known.issuperset(row) else sorted(row.keys() - known)
