"""A bounded folder of files that can be made again. What was used longest ago goes first."""

import contextlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = "."  # what names of files begin with that are being written


class BoundedFolder:
    """Files by name, in a folder that belongs to one process at a time; safe to use from several threads.

    Losing one costs time only, so nothing is synced.

    Args:
        folder: made when missing.
        max_bytes: most that all take together.
        max_files: most files.
    """

    def __init__(self, folder: Path, max_bytes: int, max_files: int) -> None:
        self.max_bytes = max_bytes
        self._folder = folder
        self._max_files = max_files
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"{_PARTIAL}*"):
            partial.unlink()  # left by a process that died
        files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
        for stat, path in sorted(files, key=lambda each: each[0].st_atime_ns):
            self._note(path.relative_to(folder).as_posix(), stat.st_size)

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._sizes

    def names(self) -> Sequence[str]:
        """All files, the longest unused first."""
        with self._lock:
            return list(self._sizes)

    def used(self, name: str) -> Path | None:
        """Where a file is that is used now, if it is there; it may be gone a moment later."""
        with self._lock:
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
        return self._folder / name

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Gives a place to write a file to; it is kept as `name`, and others go for it, if it stands there at the end.

        Raises:
            OSError: it could not be kept.
        """
        partial = self._folder / f"{_PARTIAL}{secrets.token_hex(8)}"
        try:
            yield partial
            if partial.exists():
                file = self._folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                size_bytes = partial.stat().st_size
                partial.replace(file)
                with self._lock:
                    self._note(name, size_bytes)
        finally:
            partial.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Removes a file, if it is there."""
        with self._lock:
            self._remove(name)

    def _note(self, name: str, size_bytes: int) -> None:
        self._bytes += size_bytes - self._sizes.pop(name, 0)
        self._sizes[name] = size_bytes
        while self._bytes > self.max_bytes or len(self._sizes) > self._max_files:
            self._remove(next(iter(self._sizes)))

    def _remove(self, name: str) -> None:
        self._bytes -= self._sizes.pop(name, 0)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / name).unlink()
