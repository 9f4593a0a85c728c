"""Uploads under way, as files: one an upload, so that two writers of one blob do not meet."""

import contextlib
import hashlib
import secrets
import time
from pathlib import Path

from veneer_dataset.adapters.disk import full_disk
from veneer_rpc.errors import OutOfRange

_HASHED_AT_ONCE = 1024 * 1024


class PartialFolder:
    """A PartialBlobs in a folder: `<tenant>/<digest>.part` is what a broken upload left.

    Files of uploads that a dead process left are put in their place when this is made; so a folder belongs to
    one process at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*/*.open-*"):
            _keep(file, file.with_suffix(".part"))

    def received_bytes(self, tenant: str, digest: str) -> int:
        """See PartialBlobs."""
        with contextlib.suppress(FileNotFoundError):
            return self._left(tenant, digest).stat().st_size
        return 0

    def begin(self, tenant: str, digest: str, offset_bytes: int) -> "PartialFile":
        """See PartialBlobs."""
        left = self._left(tenant, digest)
        own = left.with_suffix(f".open-{secrets.token_hex(8)}")
        if offset_bytes:
            received = self.received_bytes(tenant, digest)
            if offset_bytes == received:
                with contextlib.suppress(FileNotFoundError):  # another upload may take it at this moment
                    left.rename(own)
                    return PartialFile(own, left)
                received = 0
            raise OutOfRange(
                "OFFSET_MISMATCH",
                f"offset {offset_bytes}, but {received} bytes of blob {digest} have arrived",
                metadata={"received_bytes": str(received)},
            )
        left.parent.mkdir(exist_ok=True)
        return PartialFile(own, left)

    def remove_older_than(self, age_s: float) -> None:
        """Removes what uploads that broke so long ago have left."""
        before_s = time.time() - age_s
        for file in self._folder.glob("*/*.part"):
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_mtime < before_s:
                    file.unlink()

    def _left(self, tenant: str, digest: str) -> Path:
        return self._folder / tenant / f"{digest}.part"


class PartialFile:
    """A PartialBlob in a file of its own."""

    def __init__(self, file: Path, left: Path) -> None:
        self._path = file
        self._left = left
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0
        self._file = file.open("ab+")
        self._file.seek(0)
        while piece := self._file.read(_HASHED_AT_ONCE):
            self._sha256.update(piece)
            self.size_bytes += len(piece)

    def write(self, data: bytes) -> None:
        """See PartialBlob."""
        with full_disk():
            self._file.write(data)
        self._sha256.update(data)
        self.size_bytes += len(data)

    def finish(self) -> tuple[str, Path]:
        """See PartialBlob."""
        with full_disk():
            self._file.close()
        return self._sha256.hexdigest(), self._path

    def keep(self) -> None:
        """See PartialBlob."""
        with full_disk():
            self._file.close()
        _keep(self._path, self._left)

    def discard(self) -> None:
        """See PartialBlob."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def _keep(file: Path, left: Path) -> None:
    """Puts a broken upload's file in its place, unless there is a longer one or it is empty."""
    size_bytes = file.stat().st_size
    if size_bytes and (not left.exists() or left.stat().st_size < size_bytes):
        file.replace(left)
    else:
        file.unlink()
