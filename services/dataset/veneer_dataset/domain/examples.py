"""Reading a version's rows in an order, from any place, with pictures in the wanted form."""

import itertools
from array import array
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from veneer_dataset.domain.blobs import Blobs
from veneer_dataset.domain.tokens import Counting
from veneer_dataset.domain.versions import StoredVersion
from veneer_dataset.ports import PictureResizer, VersionStore
from veneer_digests import epoch_order
from veneer_rpc.errors import DataLoss, NotFound, OutOfRange

_ROWS_AT_ONCE = 256
_RESIZED_AT_ONCE = 16
_RESIZED_BYTES_AT_ONCE = 16 * 1024 * 1024
_BYTES_AT_ONCE = 1024 * 1024  # small enough to stay in a core's cache from the disk to the wire

_decode = msgspec.json.Decoder().decode


class PictureForm(IntEnum):
    """How pictures come."""

    DIGEST = 1
    ORIGINAL = 2
    RESIZED = 3


@dataclass(frozen=True, slots=True)
class Shuffle:
    """The order of one epoch."""

    seed: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is read: `limit` 0 is to the end; `counting` is there for resized pictures."""

    split: str
    shuffle: Shuffle | None
    offset: int
    limit: int
    form: PictureForm
    counting: Counting | None


@dataclass(frozen=True, slots=True)
class Example:
    """A row at its place in the order; `pictures` holds, in the order of its parts, what the form asks for."""

    index: int
    row_digest: bytes
    row: dict[str, Any]
    pictures: Sequence[bytes | NDArray[np.uint8]]


class _Digests(Sequence[str]):
    """Digests in hex out of packed ones; a million of them as texts would take a hundred megabytes."""

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed) // 32

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401  # an overload that nobody here needs
        return self.packed(index).hex()

    def packed(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._packed[32 * index : 32 * index + 32]


class Examples:
    """Reads examples; safe to use from several threads."""

    def __init__(self, versions: VersionStore, blobs: Blobs, resizer: PictureResizer) -> None:
        self._versions = versions
        self._blobs = blobs
        self._resizer = resizer

    def read(self, tenant: str, stored: StoredVersion, wanted: Wanted) -> Generator[list[Example], None, None]:
        """Yields examples in the wanted order, some at a time: about 1 MiB with their pictures.

        Raises:
            NotFound: the version has no such split, or was deleted.
            OutOfRange: the offset lies past the split's end.
            DataLoss: a picture of the version is gone or cannot be decoded.
        """
        bounds = stored.split_bounds(wanted.split)
        if bounds is None:
            splits = ", ".join(each.split for each in stored.version.splits)
            raise NotFound("SPLIT_NOT_FOUND", f"there is no split {wanted.split[:80]!r}, only {splits}")
        start, count = bounds
        if wanted.offset > count:
            raise OutOfRange("OFFSET_PAST_END", f"offset {wanted.offset}, the split has {count} rows")
        digests = _Digests(self._versions.row_digests(stored.key, start, count))
        order: Sequence[int] = range(count)
        if wanted.shuffle is not None:
            order = array("l", epoch_order(wanted.shuffle.seed, wanted.shuffle.epoch, digests))
        end = min(wanted.offset + wanted.limit, count) if wanted.limit else count
        at, rows_at_once = wanted.offset, _rows_at_once(wanted)
        while at < end:
            some = order[at : min(at + rows_at_once, end)]
            rows = self._versions.rows(stored.key, [start + position for position in some])
            if len(rows) < len(some):
                raise NotFound("VERSION_NOT_FOUND", "the version was deleted while it was read")
            bare = [_decode(rows[start + position]) for position in some]
            examples: list[Example] = []
            size_bytes = 0
            for position, row, pictures in zip(some, bare, self._pictures(tenant, bare, wanted), strict=True):
                examples.append(Example(at, digests.packed(position), row, pictures))
                at += 1
                size_bytes += sum(each.nbytes if isinstance(each, np.ndarray) else len(each) for each in pictures)
                if size_bytes >= _BYTES_AT_ONCE:
                    yield examples
                    examples, size_bytes = [], 0
            if examples:
                yield examples

    def _pictures(
        self, tenant: str, rows: Sequence[dict[str, Any]], wanted: Wanted
    ) -> Iterator[Sequence[bytes | NDArray[np.uint8]]]:
        """Pictures of each row; those as uploaded are read when it is their turn."""
        digests = [list(picture_digests(row)) for row in rows]
        each = [digest for its_digests in digests for digest in its_digests]
        if wanted.form is PictureForm.DIGEST:
            yield from itertools.repeat((), len(rows))
        elif wanted.counting is not None and wanted.form is PictureForm.RESIZED:
            resized = iter(
                self._resizer.resized(tenant, each, wanted.counting.processor.pixels, wanted.counting.contract_digest)
            )
            for its_digests in digests:
                yield [next(resized) for _ in its_digests]
        else:
            blobs = self._blobs.known(tenant, list(set(each)))
            if gone := next((digest for digest in each if digest not in blobs), None):
                raise DataLoss("BLOB_LOST", f"blob {gone} is gone, though the version names it")
            for its_digests in digests:
                yield [b"".join(self._blobs.read(blobs[digest])) for digest in its_digests]


def picture_digests(row: dict[str, Any]) -> Iterator[str]:
    """Digests of a canonical row's pictures, in the order of messages and parts."""
    for message in row["messages"]:
        for part in message["content"]:
            if part["type"] == "image":
                yield part["digest"]


def _rows_at_once(wanted: Wanted) -> int:
    if wanted.counting is None:
        return _ROWS_AT_ONCE
    picture_bytes = 3 * wanted.counting.processor.pixels.bounds.max_pixels
    return max(1, min(_RESIZED_AT_ONCE, _RESIZED_BYTES_AT_ONCE // picture_bytes))
