"""A bounded cache of resized pictures on disk; what was used longest ago goes first."""

import contextlib
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEAD = np.dtype(">u4")
_MAX_ENTRIES = 200_000  # so that the index stays small where pictures are

Key = tuple[str, str, str]
"""Tenant, the file's digest, and the digest of the contract that resized it."""


class PixelCache:
    """Pixels by tenant, picture and contract; `folder` belongs to one process at a time.

    Losing an entry costs time only, so nothing is synced; a file that was cut short is told by its size.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
        for stat, path in sorted(files, key=lambda each: each[0].st_mtime):
            self._note(path.relative_to(folder).as_posix(), stat.st_size)

    def get(self, key: Key) -> NDArray[np.uint8] | None:
        """The pixels, (height, width, 3), or None."""
        name = _name(key)
        with self._lock:
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
        try:
            data = (self._folder / name).read_bytes()
        except FileNotFoundError:  # dropped in the meantime
            return None
        height, width = (int(each) for each in np.frombuffer(data[:8], _HEAD)) if len(data) >= 8 else (0, 0)
        if len(data) != 8 + 3 * height * width or not height:
            return None
        return np.frombuffer(data, np.uint8, offset=8).reshape(height, width, 3)

    def put(self, key: Key, rgb: NDArray[np.uint8]) -> None:
        """Keeps pixels, and drops others for them; on a full disk it keeps nothing."""
        name = _name(key)
        file = self._folder / name
        temporary = file.with_suffix(f".{secrets.token_hex(4)}")
        head = np.array(rgb.shape[:2], _HEAD).tobytes()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(head + rgb.tobytes())
            temporary.replace(file)
        except OSError:
            temporary.unlink(missing_ok=True)
            return
        with self._lock:
            self._note(name, len(head) + rgb.nbytes)

    def _note(self, name: str, size_bytes: int) -> None:
        self._bytes += size_bytes - self._sizes.pop(name, 0)
        self._sizes[name] = size_bytes
        while self._bytes > self._max_bytes or len(self._sizes) > _MAX_ENTRIES:
            dropped, dropped_bytes = self._sizes.popitem(last=False)
            self._bytes -= dropped_bytes
            with contextlib.suppress(FileNotFoundError):
                (self._folder / dropped).unlink()


def _name(key: Key) -> str:
    tenant, digest, contract = key
    return f"{tenant}/{contract}/{digest[:2]}/{digest}"
