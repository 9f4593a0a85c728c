"""What the domain asks of the outside; adapters answer, tests answer with fakes.

All of it is synchronous and safe to call from several threads.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from veneer_dataset.domain.blobs import Blob
    from veneer_dataset.domain.datasets import Dataset
    from veneer_dataset.domain.findings import Finding, Severity
    from veneer_dataset.domain.making import Made
    from veneer_dataset.domain.packed import NewRow, PackedRow
    from veneer_dataset.domain.pictures import PictureFacts
    from veneer_dataset.domain.versions import DatasetVersion, Hold, StoredVersion
    from veneer_processing.pixels import PixelSettings


class BlobStore(Protocol):
    """Bytes by location: 1 to 4 names of a-z, 0-9 and '-', with / between them. A location is written once."""

    def put(self, location: str, source: Path) -> None:
        """Moves a file in; durable when this returns.

        Raises:
            ResourceExhausted: no space is left.
        """

    def read(self, location: str, offset_bytes: int = 0) -> Iterator[bytes]:
        """Yields bytes from an offset on, at most 1 MiB at once.

        Raises:
            FileNotFoundError: there is nothing there.
        """

    def whole(self, location: str, size_bytes: int) -> bytes:
        """Returns all bytes, of which there should be so many.

        Raises:
            FileNotFoundError: there is nothing there.
        """

    def at_hand(self, location: str, into: memoryview) -> bool:
        """Puts a blob of that many bytes there; returns False where a disk or network would or may be waited for."""

    def delete(self, location: str) -> None:
        """Removes it; nothing happens where there is none."""

    def locations(self) -> Iterator[tuple[str, datetime]]:
        """Yields every location and when it was written."""


class PackedRows(Protocol):
    """A version's rows by their position, ready to be sent; to be closed."""

    def digests(self, start: int, count: int) -> bytes:
        """Returns the digests of rows one after another, 32 bytes each."""

    def some_bodies(self, positions: NDArray[np.int64]) -> Sequence[bytes]:
        """Returns the bytes of the first of these rows: one at least, about 1 MiB at most."""

    def some_run(self, start: int, end: int) -> tuple[int, bytes]:
        """Returns how many rows from a position on these are, and their bytes in one, each after its head.

        A head says a row's index in its split's stored order. One row at least, about 1 MiB at most.
        """

    def some_rows(self, positions: NDArray[np.int64]) -> Sequence["PackedRow"]:
        """Returns the first of these rows, one at least, with the places of their pictures."""

    def close(self) -> None:
        """Lets go of what the rows are read from."""


class Packs(Protocol):
    """Packs of rows by name: derived, bounded, and free to be lost at any time."""

    def open(self, name: str) -> PackedRows | None:
        """Returns the pack of that name; None where there is none, or only a damaged one."""

    def make(self, name: str, rows: "Callable[[], Iterator[Sequence[NewRow]]]") -> Iterator[None]:
        """Makes a pack of all rows of a version, or waits for who makes it; yields meanwhile.

        There may be no pack afterwards: where it would be larger than the bound, or the disk is full.
        """

    def drop(self, name: str) -> None:
        """Removes a pack; nothing happens where there is none. Who has opened it reads on."""

    def names(self) -> Sequence[str]:
        """Returns the names of all packs."""


class BlobIndex(Protocol):
    """Which blobs a tenant has, and where they lie."""

    @property
    def fresh_s(self) -> float:
        """Seconds within which asking again for a blob need not be noted anew."""

    def find(self, tenant: str, digests: Sequence[str]) -> Mapping[str, "Blob"]:
        """Returns those of the named blobs that the tenant has, and notes that they were asked for."""

    def add(self, tenant: str, blobs: Sequence["Blob"]) -> Sequence["Blob"]:
        """Adds blobs, which counts as asking for them; returns those that were there already, as they were sent."""

    def size_bytes(self, tenant: str) -> int:
        """Returns bytes of all of a tenant's blobs."""

    def collect(self, not_since: datetime, limit: int) -> Sequence["Blob"]:
        """Forgets up to so many blobs that no version names and nobody has asked for since; returns them."""

    def has_location(self, location: str) -> bool:
        """Says whether a blob lies there."""


class PartialBlobs(Protocol):
    """Uploads under way, and what is left of broken ones."""

    def received_bytes(self, tenant: str, digest: str) -> int:
        """Returns how much of a blob a broken upload left behind."""

    def begin(self, tenant: str, digest: str, offset_bytes: int) -> "PartialBlob":
        """Starts a blob, or continues a broken upload.

        Raises:
            OutOfRange: the offset is neither 0 nor what has been received.
        """


class PartialBlob(Protocol):
    """One blob under way."""

    @property
    def size_bytes(self) -> int:
        """Bytes so far."""

    def write(self, data: bytes) -> None:
        """Adds bytes; raises ResourceExhausted when no space is left."""

    def finish(self) -> tuple[str, Path]:
        """Returns the SHA-256 of all bytes and their file, which is then the caller's."""

    def keep(self) -> None:
        """Ends a broken upload; what has arrived is kept for the next one."""

    def discard(self) -> None:
        """Ends an upload whose bytes are worth nothing."""


class PictureChecker(Protocol):
    """Decodes one tenant's pictures to see whether they are sound."""

    def check(self, digests: Iterable[str], inline_folder: Path) -> Iterator[tuple[int, "PictureFacts"]]:
        """Yields position and facts of each picture, in any order.

        Args:
            digests: of the pictures.
            inline_folder: has files, named by digest, that are no blobs yet.
        """


class PictureResizer(Protocol):
    """Gives pixels as the model sees them."""

    def resized(
        self, tenant: str, digests: Sequence[str], pixels: "PixelSettings", contract_digest: str
    ) -> Sequence[NDArray[np.uint8]]:
        """Returns (height, width, 3) uint8 of each picture.

        Raises:
            DataLoss: a picture of a version cannot be read or decoded any more.
        """


class FactStore(Protocol):
    """Remembers what decoding a picture told, by content."""

    def find(self, tenant: str, digests: Sequence[str]) -> Mapping[str, "PictureFacts"]:
        """Returns what is known of the named pictures."""

    def add(self, tenant: str, facts: Mapping[str, "PictureFacts"]) -> None:
        """Remembers facts by digest."""


class DatasetStore(Protocol):
    """Datasets by tenant and id."""

    def insert(self, tenant: str, dataset: "Dataset") -> "Dataset":
        """Adds a dataset; raises AlreadyExists."""

    def get(self, tenant: str, dataset_id: str) -> "Dataset":
        """Returns a dataset; raises NotFound."""

    def page(self, tenant: str, before: int | None, limit: int) -> Sequence[tuple[int, "Dataset"]]:
        """Returns datasets with their sequence numbers, newest first, from before a number on."""

    def replace(self, tenant: str, dataset: "Dataset", etag: str) -> "Dataset":
        """Changes display name, prompt and labels; raises NotFound, and Aborted for a stale etag."""

    def delete(self, tenant: str, dataset_id: str, etag: str, now: datetime) -> None:
        """Removes a dataset and its versions.

        Raises:
            NotFound: there is none.
            Aborted: the etag is stale.
            FailedPrecondition: a version is held.
        """


class VersionStore(Protocol):
    """Versions with their rows, findings and holds."""

    def save(
        self, tenant: str, dataset_id: str, made: "Made", labels: Mapping[str, str], pictures: Sequence[str]
    ) -> "DatasetVersion":
        """Keeps what was made in one transaction; a version that exists gets the new report and labels.

        Args:
            tenant: whose.
            dataset_id: of which dataset.
            made: what.
            labels: of the version.
            pictures: digests of those that its rows name, sorted, none twice.

        Raises:
            NotFound: the dataset is gone.
            Aborted: a picture was deleted in the meantime.
        """

    def get(self, tenant: str, dataset_id: str, digest_prefix: str) -> "StoredVersion":
        """Returns the version whose digest begins so; raises NotFound where none or several do."""

    def page(self, tenant: str, dataset_id: str, before: int | None, limit: int) -> Sequence["StoredVersion"]:
        """Returns versions, the newest first, from before a key on."""

    def delete(self, tenant: str, dataset_id: str, digest: str, now: datetime) -> None:
        """Removes a version; raises NotFound, and FailedPrecondition while it is held."""

    def findings(
        self, key: int, severity: "Severity | None", code: str, after: int, limit: int
    ) -> Sequence[tuple[int, "Finding"]]:
        """Returns findings with their numbers, in order, from after a number on."""

    def row_digests(self, key: int, start: int, count: int) -> bytes:
        """Returns the digests of rows by their position, 32 bytes each."""

    def rows(self, key: int, positions: Sequence[int]) -> Mapping[int, tuple[bytes, bytes]]:
        """Returns digests and canonical rows by position."""

    def exists(self, key: int) -> bool:
        """Says whether there is such a version."""

    def place_hold(self, key: int, hold: "Hold") -> None:
        """Adds or extends a hold."""

    def release_hold(self, key: int, holder: str) -> None:
        """Removes a hold, if there is one."""
