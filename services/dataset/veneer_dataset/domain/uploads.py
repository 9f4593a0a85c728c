"""One stream of uploaded blobs: which piece may follow which, and when a blob is complete."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from veneer_dataset.domain.blobs import Blobs
from veneer_dataset.ports import PartialBlob, PartialBlobs
from veneer_rpc.errors import DataLoss, InvalidArgument, OutOfRange, ResourceExhausted, violations

MAX_BLOB_BYTES = 4 * 1024**3
MAX_PIECE_BYTES = 1024 * 1024

_ADDED_AT_ONCE = 200
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """Announces a blob.

    Raises:
        InvalidArgument: with every wrong field.
    """

    digest: str
    size_bytes: int
    offset_bytes: int = 0

    def __post_init__(self) -> None:
        with violations() as found:
            if not _DIGEST.fullmatch(self.digest):
                found.add(
                    "header.digest", "INVALID_DIGEST", f"must be 64 lower-case hex digits, was {self.digest[:80]!r}"
                )
            if not 0 <= self.size_bytes <= MAX_BLOB_BYTES:
                found.add("header.size_bytes", "OUT_OF_RANGE", f"must be 0 to {MAX_BLOB_BYTES}, was {self.size_bytes}")
            if self.offset_bytes < 0:
                found.add("header.offset_bytes", "OUT_OF_RANGE", f"must be 0 or more, was {self.offset_bytes}")


class Upload:
    """One tenant's stream of headers and bytes.

    Args:
        tenant: whose blobs they are.
        blobs: takes the complete ones.
        partial: holds what has arrived.
        quota_bytes: most bytes that the tenant may store.
    """

    def __init__(self, tenant: str, blobs: Blobs, partial: PartialBlobs, quota_bytes: int) -> None:
        self._tenant = tenant
        self._blobs = blobs
        self._partial = partial
        self._room_bytes = quota_bytes - blobs.size_bytes(tenant)
        self._quota_bytes = quota_bytes
        self._header: BlobHeader | None = None
        self._blob: PartialBlob | None = None
        self._finished: list[tuple[str, Path]] = []
        self.completed: list[str] = []

    def take(self, pieces: Iterable[BlobHeader | bytes]) -> None:
        """Takes some pieces of the stream.

        Raises:
            InvalidArgument: bytes without a header, a header inside a blob, or too large a piece.
            OutOfRange: a gap, an overlap, or more bytes than declared.
            DataLoss: the bytes do not hash to the digest.
            ResourceExhausted: the tenant's quota or the disk is full.
        """
        for piece in pieces:
            if isinstance(piece, BlobHeader):
                self._begin(piece)
            else:
                self._write(piece)
            self._finish_if_whole()
        if len(self._finished) >= _ADDED_AT_ONCE:
            self._add()

    def close(self) -> None:
        """Ends the stream, whole or broken; what has arrived is kept."""
        if self._blob is not None:
            self._blob.keep()
            self._blob = None
        self._add()

    def _begin(self, header: BlobHeader) -> None:
        if self._blob is not None and self._header is not None:
            raise InvalidArgument(
                "BLOB_UNFINISHED",
                f"a header came when blob {self._header.digest} had {self._blob.size_bytes} of "
                f"{self._header.size_bytes} bytes",
            )
        if header.offset_bytes > header.size_bytes:
            raise OutOfRange("OFFSET_PAST_END", f"offset {header.offset_bytes}, the blob has {header.size_bytes} bytes")
        self._room_bytes -= header.size_bytes
        if self._room_bytes < 0:
            raise ResourceExhausted(
                "QUOTA_EXCEEDED",
                f"blob {header.digest} of {header.size_bytes} bytes is {-self._room_bytes} bytes over the quota "
                f"of {self._quota_bytes}",
                retry_after_s=3600,
            )
        self._header = header
        self._blob = self._partial.begin(self._tenant, header.digest, header.offset_bytes)

    def _write(self, data: bytes) -> None:
        if self._header is None:
            raise InvalidArgument("HEADER_MISSING", "bytes came before a header")
        if len(data) > MAX_PIECE_BYTES:
            raise InvalidArgument("PIECE_TOO_LARGE", f"a piece has {len(data)} bytes, the limit is {MAX_PIECE_BYTES}")
        received = self._blob.size_bytes if self._blob is not None else self._header.size_bytes
        if received + len(data) > self._header.size_bytes:
            raise OutOfRange(
                "MORE_THAN_DECLARED",
                f"{received + len(data)} bytes came for blob {self._header.digest}, "
                f"declared were {self._header.size_bytes}",
            )
        if self._blob is not None:
            self._blob.write(data)

    def _finish_if_whole(self) -> None:
        if self._blob is None or self._header is None or self._blob.size_bytes < self._header.size_bytes:
            return
        blob, self._blob = self._blob, None
        digest, file = blob.finish()
        if digest != self._header.digest:
            blob.discard()
            raise DataLoss(
                "DIGEST_MISMATCH",
                f"the bytes of blob {self._header.digest} hash to {digest}",
                metadata={"digest": self._header.digest, "actual": digest},
            )
        self._finished.append((digest, file))

    def _add(self) -> None:
        self._blobs.add(self._tenant, self._finished)
        self.completed += [digest for digest, _ in self._finished]
        self._finished = []
