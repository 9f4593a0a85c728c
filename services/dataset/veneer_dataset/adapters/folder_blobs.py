"""Blobs in a local folder."""

import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from veneer_dataset.adapters.disk import move_durably

_PIECE_BYTES = 1024 * 1024
_READS_AT_ONCE = hasattr(os, "RWF_NOWAIT")  # Linux tells what is in its memory


class FolderBlobs:
    """A BlobStore: a location is a path below one folder, on the file system that files are moved in from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, location: str, source: Path) -> None:
        """See BlobStore."""
        move_durably(source, self._folder / location)

    def read(self, location: str, offset_bytes: int = 0) -> Iterator[bytes]:
        """See BlobStore."""
        descriptor = os.open(f"{self._folder}/{location}", os.O_RDONLY)
        try:
            size_bytes = os.fstat(descriptor).st_size
            while (most := min(_PIECE_BYTES, size_bytes - offset_bytes)) > 0:
                piece = os.pread(descriptor, most, offset_bytes)
                if not piece:
                    return  # cut short meanwhile, which the reader sees
                offset_bytes += len(piece)
                yield piece
        finally:
            os.close(descriptor)

    def whole(self, location: str, size_bytes: int) -> bytes:
        """See BlobStore."""
        # A version's pictures are read by the thousand: each call of the system costs a turn for Python's lock.
        descriptor = os.open(f"{self._folder}/{location}", os.O_RDONLY)
        try:
            data = os.pread(descriptor, size_bytes, 0)
            while len(data) < size_bytes and (more := os.pread(descriptor, size_bytes - len(data), len(data))):
                data += more
            return data
        finally:
            os.close(descriptor)

    def at_hand(self, location: str, into: memoryview) -> bool:
        """See BlobStore. The name is looked up, which may cost a look at the folder; the bytes are in memory."""
        if not _READS_AT_ONCE:
            return False
        try:
            descriptor = os.open(f"{self._folder}/{location}", os.O_RDONLY)
            try:
                read_bytes = os.preadv(descriptor, [into], 0, os.RWF_NOWAIT)
            finally:
                os.close(descriptor)
        except OSError:  # it is not in memory, or not there at all: `whole` finds out
            return False
        return read_bytes == len(into)

    def delete(self, location: str) -> None:
        """See BlobStore."""
        (self._folder / location).unlink(missing_ok=True)

    def locations(self) -> Iterator[tuple[str, datetime]]:
        """See BlobStore."""
        for path in self._folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if path.is_file():
                    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
                    yield path.relative_to(self._folder).as_posix(), written
