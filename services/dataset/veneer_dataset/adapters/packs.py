"""Packs in a bounded folder: a version's rows as they are sent, each pack one file.

A file is: its head; the rows in stored order, each its head and then its body; their pictures, in msgpack; where each
row's head and body begin and the last ends; where each row's pictures begin and the last of them end; the digests of
all rows. Places are 64 bits, numbers little-endian. The file's head holds a checksum over the file's name and all else
in it, which is compared when this process first opens it; later, that nobody has written to it since.
"""

import os
import struct
import tempfile
import threading
import time
import zlib
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from veneer_dataset.adapters.bounded_folder import BoundedFolder
from veneer_dataset.domain.packed import NewRow, PackedPicture, PackedRow
from veneer_rpc.errors import Unavailable

_MAGIC = b"VNRPACK1"  # another format has another number
_HEAD = struct.Struct("<8sQQI")  # magic, rows, bytes of them and their pictures, checksum
_SIZES = struct.Struct("<QQ")
_DIGEST_BYTES = 32
_BYTES_AT_ONCE = 1024 * 1024
_WAIT_S = 0.02
_MAX_PACKS = 100_000

_to_pictures = msgspec.msgpack.Decoder(list[PackedPicture]).decode
_from_pictures = msgspec.msgpack.Encoder().encode


class Pack:
    """PackedRows of an open file, of which it takes over the descriptor. Places are in memory: 24 bytes a row.

    Raises:
        ValueError: the file is of another format.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        head = os.pread(descriptor, _HEAD.size, 0)
        magic, rows, data_bytes, self._checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0, 0)
        self._rows, self._data_bytes = rows, data_bytes
        self._places_at = _HEAD.size + data_bytes
        self._digests_at = self._places_at + 8 * (2 * rows + 1 + rows + 1)
        if magic != _MAGIC:
            raise ValueError("not a pack")
        self._rows_at = self._pictures_at = np.empty(0, np.int64)

    def check(self, name: str) -> None:
        """Raises ValueError where the file is not as it was written."""
        checksum, at = zlib.crc32(name.encode()), _HEAD.size
        while piece := os.pread(self._descriptor, _BYTES_AT_ONCE, at):
            checksum, at = zlib.crc32(piece, checksum), at + len(piece)
        if zlib.crc32(_SIZES.pack(self._rows, self._data_bytes), checksum) != self._checksum:
            raise ValueError("the checksum is another")

    def load(self) -> Self:
        """Reads the places of rows, which all but `digests` need."""
        places = np.frombuffer(self._read(self._places_at, self._digests_at), "<i8")
        self._rows_at, self._pictures_at = np.split(places, [2 * self._rows + 1])
        return self

    def digests(self, start: int, count: int) -> bytes:
        """See PackedRows."""
        return self._read(*(self._digests_at + _DIGEST_BYTES * each for each in (start, start + count)))

    def some_bodies(self, positions: NDArray[np.int64]) -> Sequence[bytes]:
        """See PackedRows."""
        starts, ends = self._rows_at[2 * positions + 1], self._rows_at[2 * positions + 2]
        count = max(1, int(np.searchsorted(np.cumsum(ends - starts), _BYTES_AT_ONCE)))
        return self._spans(positions[:count], starts[:count], ends[:count])

    def some_run(self, start: int, end: int) -> tuple[int, bytes]:
        """See PackedRows."""
        heads_at = self._rows_at[2 * start : 2 * end + 1 : 2]
        count = max(1, int(np.searchsorted(heads_at, heads_at[0] + _BYTES_AT_ONCE)) - 1)
        return count, self._read(int(heads_at[0]), int(heads_at[count]))

    def some_rows(self, positions: NDArray[np.int64]) -> Sequence[PackedRow]:
        """See PackedRows."""
        bodies = self.some_bodies(positions)
        these = positions[: len(bodies)]
        pictures = self._spans(these, self._pictures_at[these], self._pictures_at[these + 1])
        return list(map(PackedRow, bodies, map(_to_pictures, pictures)))

    def close(self) -> None:
        """See PackedRows."""
        os.close(self._descriptor)

    def _spans(
        self, positions: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> Sequence[bytes]:
        if (np.diff(positions) == 1).all():
            first = int(starts[0])
            data = self._read(first, int(ends[-1]))
            return [data[a:b] for a, b in zip((starts - first).tolist(), (ends - first).tolist(), strict=True)]
        return list(map(self._read, starts.tolist(), ends.tolist()))

    def _read(self, start: int, end: int) -> bytes:
        try:
            data = os.pread(self._descriptor, end - start, start)
            while len(data) < end - start:  # as after 2 GiB
                more = os.pread(self._descriptor, end - start - len(data), start + len(data))
                if not more:
                    raise OSError("it ends too soon")
                data += more
        except OSError as error:
            raise Unavailable("PACK_DAMAGED", f"a pack of rows was lost while it was read: {error}") from error
        return data


class PackFolder:
    """Packs in a bounded folder."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._files = BoundedFolder(folder, max_bytes, _MAX_PACKS)
        self._lock = threading.Lock()
        self._checked: dict[str, tuple[int, int]] = {}  # inode, and when it was written
        self._making: set[str] = set()
        self._too_large: set[str] = set()

    def open(self, name: str) -> Pack | None:
        """See Packs."""
        path = self._files.used(name)
        if path is None:
            self._checked.pop(name, None)
            return None
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            self.drop(name)
            return None
        try:
            stat = os.fstat(descriptor)
            pack = Pack(descriptor)
            if self._checked.get(name) != (stat.st_ino, stat.st_mtime_ns):
                pack.check(name)
                self._checked[name] = (stat.st_ino, stat.st_mtime_ns)
            os.utime(descriptor, ns=(time.time_ns(), stat.st_mtime_ns))  # used now, which a restart sees
            return pack.load()
        except (OSError, ValueError, Unavailable):
            os.close(descriptor)
            self.drop(name)
            return None

    def make(self, name: str, rows: Callable[[], Iterator[Sequence[NewRow]]]) -> Iterator[None]:
        """See Packs."""
        while True:
            with self._lock:
                if name in self._files or name in self._too_large:
                    return
                mine = name not in self._making
                self._making.add(name)
            if mine:
                break
            time.sleep(_WAIT_S)
            yield
        max_bytes = self._files.max_bytes
        try:
            with self._files.writing(name) as file:
                size_bytes = yield from _write(file, name, rows(), max_bytes)
                if size_bytes > max_bytes:
                    self._too_large.add(name)
                    file.unlink()
        except OSError:
            return
        finally:
            self._making.discard(name)

    def drop(self, name: str) -> None:
        """See Packs."""
        self._checked.pop(name, None)
        self._files.drop(name)

    def names(self) -> Sequence[str]:
        """See Packs."""
        return self._files.names()


def _write(file: Path, name: str, rows: Iterator[Sequence[NewRow]], max_bytes: int) -> Generator[None, None, int]:
    """Writes a pack and returns its size, or that at which it got too large; yields in between."""
    rows_at, pictures_at, digests = array("q", [_HEAD.size]), array("q", [0]), bytearray()
    checksum = zlib.crc32(name.encode())
    with file.open("wb") as out, tempfile.TemporaryFile(dir=file.parent) as aside:
        out.write(bytes(_HEAD.size))
        for some in rows:
            for each in some:
                body_at = rows_at[-1] + len(each.head)
                rows_at.extend((body_at, body_at + len(each.row.body)))
                pictures_at.append(pictures_at[-1] + aside.write(_from_pictures(each.row.pictures)))
                digests += each.digest
            data = b"".join(piece for each in some for piece in (each.head, each.row.body))
            checksum = zlib.crc32(data, checksum)
            out.write(data)
            if out.tell() + aside.tell() > max_bytes:
                return max_bytes + 1
            yield
        aside.seek(0)
        places = np.array(rows_at, "<i8"), rows_at[-1] + np.array(pictures_at, "<i8")
        rest = (*(each.tobytes() for each in places), bytes(digests))
        for data in chain(iter(partial(aside.read, _BYTES_AT_ONCE), b""), rest):
            checksum = zlib.crc32(data, checksum)
            out.write(data)
        size_bytes = out.tell()
        out.seek(0)
        data_bytes = rows_at[-1] + pictures_at[-1] - _HEAD.size
        sizes = len(pictures_at) - 1, data_bytes
        out.write(_HEAD.pack(_MAGIC, *sizes, zlib.crc32(_SIZES.pack(*sizes), checksum)))
    return size_bytes
