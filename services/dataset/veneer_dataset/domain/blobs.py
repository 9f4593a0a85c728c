"""Blobs by SHA-256: which of them a tenant has, how they come in, go out, and go away."""

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from veneer_dataset.ports import BlobIndex, BlobStore, PartialBlobs
from veneer_rpc.errors import DataLoss, NotFound, OutOfRange

_COLLECTED_AT_ONCE = 500
_PUT_AT_ONCE = 16


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Blob:
    """A tenant's blob; two uploads of one blob never share a location."""

    tenant: str
    digest: str
    size_bytes: int
    location: str


class Blobs:
    """All tenants' blobs."""

    def __init__(self, store: BlobStore, index: BlobIndex, partial: PartialBlobs) -> None:
        self._store = store
        self._index = index
        self._partial = partial
        self._threads = ThreadPoolExecutor(_PUT_AT_ONCE, "blobs")  # a disk syncs many files as fast as one
        self._lock = threading.Lock()
        self._needed_since: list[datetime] = []

    def missing(self, tenant: str, digests: Sequence[str]) -> list[tuple[str, int]]:
        """Digest and received bytes of each named blob that is not complete, each once, in their order."""
        wanted = list(dict.fromkeys(digests))
        found = self._index.find(tenant, wanted)
        return [(each, self._partial.received_bytes(tenant, each)) for each in wanted if each not in found]

    def find(self, tenant: str, digests: Sequence[str]) -> list[Blob]:
        """The named blobs, in their order.

        Raises:
            NotFound: the tenant lacks one of them.
        """
        found = self._index.find(tenant, list(dict.fromkeys(digests)))
        for digest in digests:
            if digest not in found:
                raise NotFound("BLOB_NOT_FOUND", f"there is no blob {digest}", metadata={"digest": digest})
        return [found[digest] for digest in digests]

    def known(self, tenant: str, digests: Sequence[str]) -> dict[str, Blob]:
        """Those of the named blobs that the tenant has, by digest."""
        return dict(self._index.find(tenant, digests))

    def read(self, blob: Blob, offset_bytes: int = 0) -> Iterator[bytes]:
        """Yields a blob's bytes from an offset on, at most 1 MiB at once.

        Raises:
            OutOfRange: the offset lies past its end.
            DataLoss: the store has lost it.
        """
        if offset_bytes > blob.size_bytes:
            raise OutOfRange("OFFSET_PAST_END", f"offset {offset_bytes}, the blob has {blob.size_bytes} bytes")
        left = blob.size_bytes - offset_bytes
        try:
            for piece in self._store.read(blob.location, offset_bytes):
                left -= len(piece)
                yield piece
        except FileNotFoundError:
            raise DataLoss("BLOB_LOST", f"the bytes of blob {blob.digest} are gone") from None
        if left:
            raise DataLoss("BLOB_LOST", f"blob {blob.digest} lacks {left} bytes")

    def whole(self, blob: Blob) -> bytes:
        """All bytes of a blob; raises DataLoss where the store has lost it."""
        try:
            data = self._store.whole(blob.location, blob.size_bytes)
        except FileNotFoundError:
            raise DataLoss("BLOB_LOST", f"the bytes of blob {blob.digest} are gone") from None
        if len(data) != blob.size_bytes:
            raise DataLoss("BLOB_LOST", f"blob {blob.digest} lacks {blob.size_bytes - len(data)} bytes")
        return data

    def at_hand(self, location: str, into: memoryview) -> bool:
        """Puts all bytes of a blob there where no disk or network is waited for; False where one may be."""
        return self._store.at_hand(location, into)

    def add(self, tenant: str, files: Sequence[tuple[str, Path]]) -> None:
        """Takes whole files in, by the digest of each; they are moved. One that was there already stays."""

        def put(digest: str, file: Path) -> Blob:
            size_bytes = file.stat().st_size
            location = f"{tenant}/{digest[:2]}/{digest}-{secrets.token_hex(8)}"
            self._store.put(location, file)
            return Blob(tenant, digest, size_bytes, location)

        blobs = list(self._threads.map(put, *zip(*files, strict=True))) if files else []
        for superfluous in self._index.add(tenant, blobs):
            self._store.delete(superfluous.location)

    def size_bytes(self, tenant: str) -> int:
        """Bytes of all of a tenant's blobs."""
        return self._index.size_bytes(tenant)

    @contextmanager
    def needed(self, clock: Callable[[], datetime] = _now) -> Iterator[None]:
        """Keeps what is asked for within the block until its end, however long that takes."""
        since = clock()
        with self._lock:
            self._needed_since.append(since)
        try:
            yield
        finally:
            with self._lock:
                self._needed_since.remove(since)

    def collect(self, grace_s: float, clock: Callable[[], datetime] = _now) -> int:
        """Deletes blobs that no version names and nobody has asked for during the grace; returns how many.

        Deletes also what a process that died left in the store without an entry in the index.
        """
        not_since, count = clock() - timedelta(seconds=grace_s), 0
        with self._lock:
            # What was asked for a moment before a block may not have been noted again in it.
            fresh = timedelta(seconds=self._index.fresh_s)
            not_since = min([not_since, *(since - fresh for since in self._needed_since)])
        while blobs := self._index.collect(not_since, _COLLECTED_AT_ONCE):
            for blob in blobs:
                self._store.delete(blob.location)
            count += len(blobs)
        for location, written in self._store.locations():
            if written < not_since and not self._index.has_location(location):
                self._store.delete(location)
        return count
