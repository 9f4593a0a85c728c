"""Blobs in S3, or any object store that obstore speaks with."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import obstore
from obstore.exceptions import NotFoundError
from obstore.store import ObjectStore

_PIECE_BYTES = 1024 * 1024


class ObjectBlobs:
    """A BlobStore: a location is a key."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def put(self, location: str, source: Path) -> None:
        """See BlobStore."""
        obstore.put(self._store, location, source)
        source.unlink()

    def read(self, location: str, offset_bytes: int = 0) -> Iterator[bytes]:
        """See BlobStore."""
        try:
            if offset_bytes and offset_bytes >= obstore.head(self._store, location)["size"]:
                return
            options = {"range": {"offset": offset_bytes}} if offset_bytes else None
            found = obstore.get(self._store, location, options=options)  # type: ignore[arg-type]  # a TypedDict
        except (NotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(location) from error
        for piece in found.stream(min_chunk_size=_PIECE_BYTES):
            view = memoryview(bytes(piece))
            for start in range(0, len(view), _PIECE_BYTES):
                yield bytes(view[start : start + _PIECE_BYTES])

    def whole(self, location: str, size_bytes: int) -> bytes:
        """See BlobStore."""
        return b"".join(self.read(location))

    def at_hand(self, location: str, into: memoryview) -> bool:
        """See BlobStore."""
        return False

    def delete(self, location: str) -> None:
        """See BlobStore."""
        try:
            obstore.delete(self._store, location)
        except (NotFoundError, FileNotFoundError):
            return

    def locations(self) -> Iterator[tuple[str, datetime]]:
        """See BlobStore."""
        for page in obstore.list(self._store):
            for meta in page:
                yield meta["path"], meta["last_modified"]
