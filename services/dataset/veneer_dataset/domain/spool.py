"""Records of a version in the making, on disk: a million rows need no memory but their places."""

import mmap
from collections.abc import Callable, Iterator
from typing import IO, Generic, TypeVar

import msgspec

_T = TypeVar("_T", bound=msgspec.Struct)
_LET_GO_EVERY = 128  # reads; each may map 64 KiB
_LENGTH_BYTES = 4
_WRITTEN_AT_ONCE = 256 * 1024  # bytes; a write for each record costs more than the record


class Spool(Generic[_T]):
    """Records appended one after another, read back in that order or by place.

    Args:
        file: an empty file, open for reading and writing; the caller closes it.
        kind: the records' type.
    """

    def __init__(self, file: IO[bytes], kind: type[_T]) -> None:
        self._file = file
        self._end = self._count = 0
        self._unwritten = bytearray()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(kind).decode

    def __len__(self) -> int:
        return self._count

    def append(self, record: _T) -> int:
        """Adds a record and returns its place."""
        data = self._encode(record)
        unwritten = self._unwritten
        unwritten += len(data).to_bytes(_LENGTH_BYTES, "big")
        unwritten += data
        if len(unwritten) > _WRITTEN_AT_ONCE:
            self._write()
        place = self._end
        self._end += _LENGTH_BYTES + len(data)
        self._count += 1
        return place

    def items(self) -> Iterator[tuple[int, _T]]:
        """Place and record of each, in the order in which they were appended."""
        place = 0
        with self.reader() as reader:
            while place < self._end:
                yield place, reader.at(place)
                place = reader.end

    def reader(self) -> "SpoolReader[_T]":
        """Opens the records for reading by place; none may be added meanwhile."""
        self._write()
        self._file.flush()
        return SpoolReader(self._file, self._end, self._decode)

    def _write(self) -> None:
        self._file.write(self._unwritten)
        self._unwritten.clear()


class SpoolReader(Generic[_T]):
    """Reads a spool's records by place, until it is closed."""

    def __init__(self, file: IO[bytes], end: int, decode: Callable[[bytes], _T]) -> None:
        self._map = mmap.mmap(file.fileno(), end, access=mmap.ACCESS_READ) if end else None
        self._decode = decode
        self._read = 0
        self.end = 0

    def __enter__(self) -> "SpoolReader[_T]":
        return self

    def __exit__(self, *_: object) -> None:
        if self._map is not None:
            self._map.close()

    def at(self, place: int) -> _T:
        """The record at a place that `append` returned; `end` is then the place after it."""
        assert self._map is not None  # noqa: S101  # there is no place in an empty spool
        self._read += 1
        if self._read % _LET_GO_EVERY == 0:
            self._map.madvise(mmap.MADV_DONTNEED)  # what was read would count as this process's memory
        start = place + _LENGTH_BYTES
        self.end = start + int.from_bytes(self._map[place:start], "big")
        return self._decode(self._map[start : self.end])
