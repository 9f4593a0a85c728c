"""Reading a version's rows in an order, from any place, with pictures in the wanted form."""

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
_PICTURE_ROWS_AT_ONCE = 16  # at first; then by their sizes
_BYTES_AT_ONCE = 16 * 1024 * 1024

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

    def read(self, tenant: str, stored: StoredVersion, wanted: Wanted) -> Generator[list[Example]]:
        """Yields examples in the wanted order, some at a time: about 16 MiB with their pictures.

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
            pictures = self._pictures(tenant, bare, wanted)
            yield [
                Example(at + number, digests.packed(position), row, its_pictures)
                for number, (position, row, its_pictures) in enumerate(zip(some, bare, pictures, strict=False))
            ]
            at += len(pictures)
            if wanted.form is PictureForm.ORIGINAL:
                rows_at_once = min(2 * len(pictures), _ROWS_AT_ONCE)

    def _pictures(
        self, tenant: str, rows: Sequence[dict[str, Any]], wanted: Wanted
    ) -> list[Sequence[bytes | NDArray[np.uint8]]]:
        """Pictures of each row, of as many rows as may be held at once: one at least."""
        digests = [list(picture_digests(row)) for row in rows]
        if wanted.form is PictureForm.DIGEST:
            return [[] for _ in rows]
        if wanted.counting is not None and wanted.form is PictureForm.RESIZED:
            each = [digest for its_digests in digests for digest in its_digests]
            resized = iter(
                self._resizer.resized(tenant, each, wanted.counting.processor.pixels, wanted.counting.contract_digest)
            )
            return [[next(resized) for _ in its_digests] for its_digests in digests]
        pictures: list[Sequence[bytes | NDArray[np.uint8]]] = []
        size_bytes = 0
        blob_by_digest = self._blobs.known(tenant, list({each for its_digests in digests for each in its_digests}))
        for its_digests in digests:
            gone = next((each for each in its_digests if each not in blob_by_digest), None)
            if gone is not None:
                raise DataLoss("BLOB_LOST", f"blob {gone} is gone, though the version names it")
            blobs = [blob_by_digest[each] for each in its_digests]
            size_bytes += sum(blob.size_bytes for blob in blobs)
            if pictures and size_bytes > _BYTES_AT_ONCE:
                break
            pictures.append([b"".join(self._blobs.read(blob)) for blob in blobs])
        return pictures


def picture_digests(row: dict[str, Any]) -> Iterator[str]:
    """Digests of a canonical row's pictures, in the order of messages and parts."""
    for message in row["messages"]:
        for part in message["content"]:
            if part["type"] == "image":
                yield part["digest"]


def _rows_at_once(wanted: Wanted) -> int:
    if wanted.form is PictureForm.DIGEST:
        return _ROWS_AT_ONCE
    if wanted.counting is None:
        return _PICTURE_ROWS_AT_ONCE
    picture_bytes = 3 * wanted.counting.processor.pixels.bounds.max_pixels
    return max(1, min(_PICTURE_ROWS_AT_ONCE, _BYTES_AT_ONCE // picture_bytes))
