"""How two versions of a dataset differ: rows added, gone, changed, and moved to another split.

Both versions are read once, side by side, in stored order (by row digest); what they share is counted only.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from veneer.dataset.v1.conversation_pb2 import ROLE_ASSISTANT
from veneer.dataset.v1.dataset_pb2 import DatasetVersion
from veneer.dataset.v1.dataset_service_pb2 import Example

Read = Callable[[str, str], AsyncIterator[Example]]
"""From a version's name and a split to its rows in stored order."""


@dataclass(frozen=True, slots=True)
class DiffRow:
    """A row and its split."""

    split: str
    example: Example


@dataclass(frozen=True, slots=True)
class DatasetDiff:
    """What a version has over an earlier one.

    Attributes:
        before: the earlier version.
        after: the later version.
        added: rows of the later one alone.
        gone: rows of the earlier one alone.
        changed: rows that ask the same (pictures, prompts and split are equal) and are answered otherwise.
        moved: rows that are in another split.
        same_rows: how many rows are in both.
    """

    before: DatasetVersion
    after: DatasetVersion
    added: tuple[DiffRow, ...]
    gone: tuple[DiffRow, ...]
    changed: tuple[tuple[DiffRow, DiffRow], ...]
    moved: tuple[tuple[DiffRow, DiffRow], ...]
    same_rows: int


async def compare(before: DatasetVersion, after: DatasetVersion, read: Read) -> DatasetDiff:
    """Compares two versions."""
    gone: list[DiffRow] = []
    added: list[DiffRow] = []
    same_rows = 0
    for split in sorted({each.split for version in (before, after) for each in version.splits}):
        ours, theirs = (_rows(version, split, read) for version in (before, after))
        old, new = await anext(ours, None), await anext(theirs, None)
        while old is not None or new is not None:
            if new is None or (old is not None and old.row_digest < new.row_digest):
                assert old is not None  # noqa: S101  # for the type checker
                gone.append(DiffRow(split, old))
                old = await anext(ours, None)
            elif old is None or new.row_digest < old.row_digest:
                added.append(DiffRow(split, new))
                new = await anext(theirs, None)
            else:
                same_rows += 1
                old, new = await anext(ours, None), await anext(theirs, None)
    gone, added, moved = _paired(gone, added, lambda row: row.example.row_digest)
    gone, added, changed = _paired(gone, added, _question)
    return DatasetDiff(before, after, tuple(added), tuple(gone), tuple(changed), tuple(moved), same_rows)


async def _rows(version: DatasetVersion, split: str, read: Read) -> AsyncIterator[Example]:
    if any(each.split == split for each in version.splits):
        async for example in read(version.name, split):
            yield example


def _paired(
    gone: list[DiffRow], added: list[DiffRow], key_of: Callable[[DiffRow], object]
) -> tuple[list[DiffRow], list[DiffRow], list[tuple[DiffRow, DiffRow]]]:
    """Those of `gone` and `added` with no partner of the same key, and the pairs."""
    waiting: defaultdict[object, list[DiffRow]] = defaultdict(list)
    for row in reversed(gone):
        waiting[key_of(row)].append(row)
    pairs, alone = [], []
    for row in added:
        partners = waiting.get(key_of(row))
        if partners:
            pairs.append((partners.pop(), row))
        else:
            alone.append(row)
    paired = {id(old) for old, _ in pairs}
    return [row for row in gone if id(row) not in paired], alone, pairs


def _question(row: DiffRow) -> object:
    asked = (each for each in row.example.messages if each.role != ROLE_ASSISTANT)
    return row.split, *(message.SerializeToString(deterministic=True) for message in asked)
