"""Rows in the form in which they are sent: kept as a pack where there is one, else made from the store.

A version never changes, so neither do its rows' bytes on the wire. What those look like is the edge's matter.
"""

from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from veneer_dataset.domain.blobs import Blob, Blobs
from veneer_dataset.domain.versions import StoredVersion
from veneer_dataset.ports import PackedRows, Packs, VersionStore
from veneer_rpc.errors import NotFound

_ROWS_AT_ONCE = 256
_FEW = 16  # one of so many rows is read without a pack, where there is none yet

_decode = msgspec.json.Decoder().decode


class PictureHole(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Where in a row's bytes a picture stands by its digest: its message, and its part, begin so many bytes in."""

    digest: str
    message_at: int
    part_at: int


class PackedPicture(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A picture of a row, where it stands there, and its blob; no `location` where the blob is gone."""

    hole: PictureHole
    size_bytes: int
    location: str


class PackedRow(msgspec.Struct, frozen=True, gc=False):
    """A row as it is sent, its pictures by digest and without its place in the order."""

    body: bytes
    pictures: Sequence[PackedPicture]


class NewRow(msgspec.Struct, frozen=True, gc=False):
    """A row for a pack: its digest, the head it has in stored order, and what is read of it again."""

    digest: bytes
    head: bytes
    row: PackedRow


class RowForm(Protocol):
    """What rows look like when they are sent; the edge knows."""

    def encoded(self, digest: bytes, row: dict[str, Any]) -> tuple[bytes, Sequence[PictureHole]]:
        """Returns the bytes of a canonical row and the places of its pictures in them."""

    def head(self, index: int, body: bytes) -> bytes:
        """Returns what stands before a row's bytes where several are sent together."""


class StoredRows:
    """PackedRows of a version, made anew each time."""

    def __init__(self, versions: VersionStore, blobs: Blobs, form: RowForm, tenant: str, stored: StoredVersion) -> None:
        self._versions = versions
        self._blobs = blobs
        self._form = form
        self._tenant = tenant
        self._key = stored.key
        counts = [each.row_count for each in stored.version.splits]
        self._split_starts = [0, *accumulate(counts)]

    def digests(self, start: int, count: int) -> bytes:
        """See PackedRows."""
        return self._versions.row_digests(self._key, start, count)

    def some_bodies(self, positions: NDArray[np.int64]) -> Sequence[bytes]:
        """See PackedRows."""
        return [body for _, body, _ in self._encoded(positions.tolist())]

    def some_run(self, start: int, end: int) -> tuple[int, bytes]:
        """See PackedRows."""
        bodies = [body for _, body, _ in self._encoded(range(start, end))]
        heads = [self._head(position, body) for position, body in enumerate(bodies, start)]
        return len(bodies), b"".join(chain.from_iterable(zip(heads, bodies, strict=True)))

    def some_rows(self, positions: NDArray[np.int64]) -> Sequence[PackedRow]:
        """See PackedRows."""
        return [row for _, row in self._rows(positions.tolist())]

    def some_new(self, start: int, end: int) -> Sequence[NewRow]:
        """Rows from a position on, one at least, as packs are made of them."""
        rows = enumerate(self._rows(range(start, end)), start)
        return [NewRow(digest, self._head(position, row.body), row) for position, (digest, row) in rows]

    def close(self) -> None:
        """See PackedRows."""

    def _rows(self, positions: Sequence[int]) -> list[tuple[bytes, PackedRow]]:
        rows = list(self._encoded(positions))
        named = {hole.digest for _, _, holes in rows for hole in holes}
        blobs = self._blobs.known(self._tenant, list(named))
        return [
            (digest, PackedRow(body, [_packed(hole, blobs.get(hole.digest)) for hole in holes]))
            for digest, body, holes in rows
        ]

    def _encoded(self, positions: Sequence[int]) -> Iterator[tuple[bytes, bytes, Sequence[PictureHole]]]:
        some = positions[:_ROWS_AT_ONCE]
        rows = self._versions.rows(self._key, some)
        if len(rows) < len(some):
            raise deleted()
        for position in some:
            digest, content = rows[position]
            yield digest, *self._form.encoded(digest, _decode(content))

    def _head(self, position: int, body: bytes) -> bytes:
        return self._form.head(position - self._split_starts[bisect_right(self._split_starts, position) - 1], body)


class RowSources:
    """Finds what a version's rows are read from."""

    def __init__(self, versions: VersionStore, blobs: Blobs, packs: Packs, form: RowForm) -> None:
        self._versions = versions
        self._blobs = blobs
        self._packs = packs
        self._form = form

    def opened(self, tenant: str, stored: StoredVersion, wanted_count: int) -> Generator[None, None, PackedRows]:
        """Returns what so many of the rows are best read from; yields while a pack of them is made."""
        name, row_count = pack_name(stored), sum(each.row_count for each in stored.version.splits)
        rows = StoredRows(self._versions, self._blobs, self._form, tenant, stored)
        pack = self._packs.open(name)
        if pack is None and wanted_count * _FEW > row_count:
            yield from self._packs.make(name, lambda: _all(rows, row_count))
            pack = self._packs.open(name)
        return pack or rows

    def forget(self, stored: StoredVersion) -> None:
        """Drops a version's pack, if there is one."""
        self._packs.drop(pack_name(stored))

    def collect(self) -> None:
        """Drops the packs of versions that were deleted."""
        for name in self._packs.names():
            if not self._versions.exists(int(name.partition("-")[0])):
                self._packs.drop(name)


def pack_name(stored: StoredVersion) -> str:
    """Names a version's pack; no two versions of a store ever have one name."""
    return f"{stored.key}-{stored.version.digest}"


def deleted() -> NotFound:
    """What a reader is told whose version is there no more."""
    return NotFound("VERSION_NOT_FOUND", "the version was deleted while it was read")


def _all(rows: StoredRows, row_count: int) -> Iterator[Sequence[NewRow]]:
    at = 0
    while at < row_count:
        some = rows.some_new(at, row_count)
        yield some
        at += len(some)


def _packed(hole: PictureHole, blob: Blob | None) -> PackedPicture:
    return PackedPicture(hole, blob.size_bytes, blob.location) if blob else PackedPicture(hole, 0, "")
