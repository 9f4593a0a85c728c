"""Blobs in a local folder."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from veneer_dataset.adapters.disk import move_durably

_PIECE_BYTES = 1024 * 1024


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
        with (self._folder / location).open("rb", buffering=0) as file:
            file.seek(offset_bytes)
            while piece := file.read(_PIECE_BYTES):
                yield piece

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
