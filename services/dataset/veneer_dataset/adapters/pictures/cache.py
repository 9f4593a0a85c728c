"""A bounded cache of resized pictures on disk."""

import contextlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from veneer_dataset.adapters.bounded_folder import BoundedFolder

_HEAD = np.dtype(">u4")
_MAX_ENTRIES = 200_000  # so that the index stays small where pictures are

Key = tuple[str, str, str]
"""Tenant, the file's digest, and the digest of the contract that resized it."""


class PixelCache:
    """Pixels by tenant, picture and contract; a file that was cut short is told by its size."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._files = BoundedFolder(folder, max_bytes, _MAX_ENTRIES)

    def get(self, key: Key) -> NDArray[np.uint8] | None:
        """The pixels, (height, width, 3), or None."""
        file = self._files.used(_name(key))
        if file is None:
            return None
        try:
            data = file.read_bytes()
        except FileNotFoundError:  # dropped in the meantime
            return None
        height, width = (int(each) for each in np.frombuffer(data[:8], _HEAD)) if len(data) >= 8 else (0, 0)
        if len(data) != 8 + 3 * height * width or not height:
            return None
        return np.frombuffer(data, np.uint8, offset=8).reshape(height, width, 3)

    def put(self, key: Key, rgb: NDArray[np.uint8]) -> None:
        """Keeps pixels, and drops others for them; on a full disk it keeps nothing."""
        head = np.array(rgb.shape[:2], _HEAD).tobytes()
        with contextlib.suppress(OSError), self._files.writing(_name(key)) as file:
            file.write_bytes(head + rgb.tobytes())


def _name(key: Key) -> str:
    tenant, digest, contract = key
    return f"{tenant}/{contract}/{digest[:2]}/{digest}"
