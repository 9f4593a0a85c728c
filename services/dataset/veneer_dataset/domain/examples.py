"""Reading a version's rows in an order, from any place, with pictures in the wanted form."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from veneer_dataset.domain.blobs import Blob, Blobs
from veneer_dataset.domain.packed import PackedPicture, PictureHole, RowSources, deleted
from veneer_dataset.domain.tokens import Counting
from veneer_dataset.domain.versions import StoredVersion
from veneer_dataset.ports import PackedRows, PictureResizer, VersionStore
from veneer_digests import epoch_order_of_packed
from veneer_rpc.errors import DataLoss, NotFound, OutOfRange, Unavailable

_ROWS_AT_ONCE = 8192
_ORIGINALS_AT_ONCE = 256  # nothing is sent while so many are looked up
_RESIZED_AT_ONCE = 16
_RESIZED_BYTES_AT_ONCE = 16 * 1024 * 1024
_BYTES_AT_ONCE = 512 * 1024  # smaller messages cost more turns; larger ones leave a core's own cache on their way
_LOOKS_EVERY_S = 0.1  # whether the version is still there

Content = bytes | memoryview | NDArray[np.uint8]
"""A picture's file, or its pixels, (height, width, 3)."""


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
    """What is read: `limit` 0 is to the end; `counting` is there for resized pictures.

    `batched` says that rows are sent several together.
    """

    split: str
    shuffle: Shuffle | None
    offset: int
    limit: int
    form: PictureForm
    counting: Counting | None
    batched: bool


class Piece(NamedTuple):
    """Rows one after another in the order; `contents` is empty where pictures stay digests.

    Attributes:
        first: index of the first row.
        bodies: of each row, as PackedRow has them.
        contents: of each row, what its pictures hold; the next piece takes the memory of files.
    """

    first: int
    bodies: Sequence[bytes]
    contents: Sequence[Sequence[tuple[PictureHole, Content]]]


class Examples:
    """Reads examples; safe to use from several threads."""

    def __init__(self, versions: VersionStore, blobs: Blobs, resizer: PictureResizer, sources: RowSources) -> None:
        self._versions = versions
        self._blobs = blobs
        self._resizer = resizer
        self._sources = sources

    def read(self, tenant: str, stored: StoredVersion, wanted: Wanted) -> Generator[Piece | bytes | None, None, None]:
        """Yields rows in the wanted order, some 512 KiB at a time; None before what may wait, for a disk or for others.

        Bytes are rows that are sent together and stand so in the pack already, with their heads. A row whose pictures
        alone are so large is the last of its piece. Of pictures as uploaded, what follows a piece waits for nothing.

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
        end = min(wanted.offset + wanted.limit, count) if wanted.limit else count
        rows = yield from self._sources.opened(tenant, stored, end - wanted.offset)
        try:
            order = np.arange(start, start + count)
            if wanted.shuffle is not None:
                digests = rows.digests(start, count)
                order = order[epoch_order_of_packed(wanted.shuffle.seed, wanted.shuffle.epoch, digests)]
            look_s = time.monotonic() + _LOOKS_EVERY_S
            for piece in self._pieces(tenant, rows, order[:end], wanted):
                if time.monotonic() > look_s:
                    yield None
                    if not self._versions.exists(stored.key):
                        raise deleted()
                    look_s = time.monotonic() + _LOOKS_EVERY_S
                yield piece
        except (DataLoss, Unavailable):
            self._sources.forget(stored)  # it is damaged, or names places that the database no longer does
            raise
        finally:
            rows.close()

    def _pieces(
        self, tenant: str, rows: PackedRows, order: NDArray[np.int64], wanted: Wanted
    ) -> Iterator[Piece | bytes | None]:
        at = wanted.offset
        if wanted.form is PictureForm.DIGEST and wanted.batched and wanted.shuffle is None:
            while at < len(order):
                count, run = rows.some_run(int(order[at]), 1 + int(order[-1]))
                yield run
                at += count
            return
        if wanted.form is PictureForm.DIGEST:
            while at < len(order):
                some_bodies = rows.some_bodies(order[at : at + _ROWS_AT_ONCE])
                yield Piece(at, some_bodies, ())
                at += len(some_bodies)
            return
        read = self._originals if wanted.counting is None else self._resized
        yield from read(tenant, rows, order, wanted)

    def _originals(
        self, tenant: str, rows: PackedRows, order: NDArray[np.int64], wanted: Wanted
    ) -> Iterator[Piece | None]:
        """Pictures as uploaded, each read when it is its turn; from memory if it is there, once a piece was sent."""
        gathered, waits = _Gathered(wanted.offset), True
        at = wanted.offset
        while at < len(order):
            if not waits:
                yield None
                waits = True
            some = rows.some_rows(order[at : at + _ORIGINALS_AT_ONCE])
            at += len(some)
            for row in some:
                contents: list[tuple[PictureHole, Content]] = []
                for picture in row.pictures:
                    content: Content | None = None
                    if not waits:
                        room = gathered.room(picture.size_bytes)
                        if self._blobs.at_hand(picture.location, room):
                            content = room
                        else:
                            yield None
                            waits = True
                    if content is None:
                        content = self._blobs.whole(_blob(tenant, picture))
                    contents.append((picture.hole, content))
                if (piece := gathered.with_row(row.body, contents)) is not None:
                    yield piece
                    waits = False
        if (piece := gathered.rest()) is not None:
            yield piece

    def _resized(self, tenant: str, rows: PackedRows, order: NDArray[np.int64], wanted: Wanted) -> Iterator[Piece]:
        assert wanted.counting is not None  # noqa: S101  # for the type checker
        pixels, contract_digest = wanted.counting.processor.pixels, wanted.counting.contract_digest
        rows_at_once = max(1, min(_RESIZED_AT_ONCE, _RESIZED_BYTES_AT_ONCE // (3 * pixels.bounds.max_pixels)))
        gathered, at = _Gathered(wanted.offset), wanted.offset
        while at < len(order):
            some = rows.some_rows(order[at : at + rows_at_once])
            at += len(some)
            digests = [each.hole.digest for row in some for each in row.pictures]
            resized = iter(self._resizer.resized(tenant, digests, pixels, contract_digest))
            for row in some:
                contents = [(each.hole, next(resized)) for each in row.pictures]
                if (piece := gathered.with_row(row.body, contents)) is not None:
                    yield piece
        if (piece := gathered.rest()) is not None:
            yield piece


class _Gathered:
    """Rows for the next piece, from an index on."""

    def __init__(self, first: int) -> None:
        self._first, self._size_bytes = first, 0
        self._bodies: list[bytes] = []
        self._contents: list[Sequence[tuple[PictureHole, Content]]] = []
        self._room = memoryview(bytearray(2 * _BYTES_AT_ONCE))
        self._free = 0

    def room(self, size_bytes: int) -> memoryview:
        """So many bytes for a picture of the next piece."""
        at, self._free = self._free, self._free + size_bytes
        if self._free > len(self._room):
            self._free = at
            return memoryview(bytearray(size_bytes))
        return self._room[at : self._free]

    def with_row(self, body: bytes, contents: Sequence[tuple[PictureHole, Content]]) -> Piece | None:
        """Takes a row; returns the piece that is large enough with it."""
        self._bodies.append(body)
        self._contents.append(contents)
        self._size_bytes += len(body)
        for _, content in contents:
            self._size_bytes += content.nbytes if isinstance(content, np.ndarray) else len(content)
        return self.rest() if self._size_bytes >= _BYTES_AT_ONCE else None

    def rest(self) -> Piece | None:
        """The rows taken since the last piece; None where there are none."""
        if not self._bodies:
            return None
        piece = Piece(self._first, self._bodies, self._contents)
        self._first, self._size_bytes = self._first + len(self._bodies), 0
        self._bodies, self._contents = [], []
        self._free = 0
        return piece


def _blob(tenant: str, picture: PackedPicture) -> Blob:
    digest = picture.hole.digest
    if not picture.location:
        raise DataLoss("BLOB_LOST", f"blob {digest} is gone, though the version names it")
    return Blob(tenant, digest, picture.size_bytes, picture.location)
