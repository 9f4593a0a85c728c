"""Folders that arrive over the wire: announced files, piece by piece, checked against size and SHA-256.

What arrives lies in a folder of its own beside its destination, and is removed unless it is taken whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from veneer_rpc.errors import DataLoss, OutOfRange, ResourceExhausted, Violation, invalid
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.failpoints import failpoint

INCOMING = ".incoming-"
_MAX_FILES = 1000
_PATH = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,100}(/(?!\.)[A-Za-z0-9._-]{1,100}){0,3}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DISK_RETRY_S = 30.0


@contextmanager
def room_on_disk(what: str) -> Iterator[None]:
    """Turns a full disk into the error that a caller can wait on.

    Raises:
        ResourceExhausted: DISK_FULL.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceExhausted(
            "DISK_FULL", f"the trainer's disk has no room for {what}", retry_after_s=_DISK_RETRY_S
        ) from error


class ReceivedFiles:
    """A folder that is being received.

    Args:
        parent: where to make it; on the file system of its destination.
        files: what was announced.
        max_bytes: most bytes of all files together.

    Raises:
        InvalidArgument: a path that is not plain, twice there or too many; a malformed digest or size.
        ResourceExhausted: the files are over `max_bytes`, or the disk has no room for them.
    """

    def __init__(self, parent: Path, files: Collection[StoredFile], max_bytes: int) -> None:
        self.files = tuple(sorted(files, key=lambda file: file.path))
        self._announced = {file.path: file for file in self.files}
        self._check(max_bytes)
        with room_on_disk(f"{self.size_bytes} bytes"):
            parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(parent).free < self.size_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.folder = Path(tempfile.mkdtemp(prefix=INCOMING, dir=parent))
        self._open: tuple[str, BinaryIO] | None = None
        self._sizes = dict.fromkeys(self._announced, 0)
        self._hashes = {path: hashlib.sha256() for path in self._announced}

    @property
    def size_bytes(self) -> int:
        """Bytes of all announced files."""
        return sum(file.size_bytes for file in self.files)

    def write(self, path: str, data: bytes) -> None:
        """Appends to a file.

        Raises:
            InvalidArgument: the file was not announced.
            OutOfRange: the file is longer than announced.
            ResourceExhausted: the disk is full.
        """
        if path not in self._announced:
            raise invalid(Violation("file.path", "FILE_UNKNOWN", f"was not announced: {path[:80]!r}"))
        self._sizes[path] += len(data)
        limit = self._announced[path].size_bytes
        if self._sizes[path] > limit:
            raise OutOfRange("FILE_TOO_LONG", f"{path} has more than the {limit} bytes that were announced")
        with room_on_disk(path):
            failpoint("file.write")
            self._file(path).write(data)
        self._hashes[path].update(data)

    def check(self) -> Path:
        """Makes the folder durable and returns it.

        Raises:
            DataLoss: a file is short or not what its digest says.
            ResourceExhausted: the disk is full.
        """
        for path, file in self._announced.items():
            with room_on_disk(path):
                if not file.size_bytes:
                    self._file(path)
            if self._sizes[path] != file.size_bytes or self._hashes[path].hexdigest() != file.digest:
                raise DataLoss(
                    "FILE_DAMAGED",
                    f"{path}: {self._sizes[path]} bytes with SHA-256 {self._hashes[path].hexdigest()[:12]}…, "
                    f"announced were {file.size_bytes} with {file.digest[:12]}…",
                )
        with room_on_disk("the last bytes"):
            self._close()
        return self.folder

    def abandon(self) -> None:
        """Removes what was received; does nothing where the folder has been taken."""
        self._close(sync=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, path: str) -> BinaryIO:
        if self._open is None or self._open[0] != path:
            self._close()
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            self._open = (path, target.open("ab"))
        return self._open[1]

    def _close(self, sync: bool = True) -> None:
        if self._open is None:
            return
        (_, file), self._open = self._open, None
        with file:
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def _check(self, max_bytes: int) -> None:
        if not 1 <= len(self.files) <= _MAX_FILES:
            text = f"must be 1 to {_MAX_FILES} files, were {len(self.files)}"
            raise invalid(Violation("header.files", "OUT_OF_RANGE", text))
        if len(self._announced) != len(self.files):
            raise invalid(Violation("header.files", "TWICE", "a path is there twice"))
        for file in self.files:
            if not (_PATH.fullmatch(file.path) and _DIGEST.fullmatch(file.digest) and file.size_bytes >= 0):
                text = f"a plain path, SHA-256 and size are needed, was {file.path[:80]!r}"
                raise invalid(Violation("header.files", "MALFORMED_FILE", text))
        if self.size_bytes > max_bytes:
            raise ResourceExhausted(
                "FILES_TOO_LARGE", f"{self.size_bytes} bytes were announced, the limit is {max_bytes}"
            )


class IncomingFolder:
    """A folder of few known files that is received without digests; sizes are told with each piece.

    Args:
        parent: where to make it; on the file system of its destination.
        names: files that it may hold.
        max_bytes: most bytes of all files together.
    """

    def __init__(self, parent: Path, names: Collection[str], max_bytes: int) -> None:
        self._names = names
        self._max_bytes = max_bytes
        self._sizes: dict[str, int] = {}
        self._open: tuple[str, BinaryIO] | None = None
        with room_on_disk("a folder"):
            parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=INCOMING, dir=parent))

    def write(self, path: str, size_bytes: int, data: bytes) -> None:
        """Appends to a file.

        Raises:
            InvalidArgument: a file that does not belong there, another size than before, or pieces that are mixed.
            OutOfRange: the file is longer than was said.
            ResourceExhausted: too many bytes, or the disk is full.
        """
        if path not in self._names:
            text = f"must be one of {', '.join(sorted(self._names))}, was {path[:80]!r}"
            raise invalid(Violation("file.path", "FILE_FOREIGN", text))
        if self._open is None or self._open[0] != path:
            if path in self._sizes:
                raise invalid(Violation("file.path", "TWICE", f"pieces of {path} must follow one another"))
            self._close()
            self._sizes[path] = size_bytes
            if size_bytes < 0 or sum(self._sizes.values()) > self._max_bytes:
                raise ResourceExhausted("FILES_TOO_LARGE", f"more than {self._max_bytes} bytes, the limit")
            with room_on_disk(path):
                self._open = (path, (self.folder / path).open("wb"))
        if size_bytes != self._sizes[path]:
            text = f"must be {self._sizes[path]} in each piece of {path}, was {size_bytes}"
            raise invalid(Violation("file.size_bytes", "SIZE_DIFFERS", text))
        file = self._open[1]
        if file.tell() + len(data) > size_bytes:
            raise OutOfRange("FILE_TOO_LONG", f"{path} has more than the {size_bytes} bytes that were said")
        with room_on_disk(path):
            file.write(data)

    def check(self) -> Path:
        """Makes the folder durable and returns it; raises DataLoss where a file is short."""
        with room_on_disk("the last bytes"):
            self._close()
        for path, size_bytes in self._sizes.items():
            if (actual := (self.folder / path).stat().st_size) != size_bytes:
                raise DataLoss("FILE_DAMAGED", f"{path}: {actual} bytes came, {size_bytes} were said")
        return self.folder

    def abandon(self) -> None:
        """Removes what was received; does nothing where the folder has been taken."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _close(self) -> None:
        if self._open is not None:
            (_, file), self._open = self._open, None
            with file:
                file.flush()
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_incoming(root: Path) -> None:
    """Removes what a process that died was receiving under a folder, at any depth."""
    for leftover in root.rglob(f"{INCOMING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
