"""One suite over every BlobStore: in memory, in a folder, in S3."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from veneer_dataset.adapters.folder_blobs import FolderBlobs
from veneer_dataset.adapters.object_blobs import ObjectBlobs
from veneer_dataset.ports import BlobStore


class MemoryBlobs:
    def __init__(self) -> None:
        self._blobs: dict[str, tuple[bytes, datetime]] = {}

    def put(self, location: str, source: Path) -> None:
        self._blobs[location] = source.read_bytes(), datetime.now(UTC)
        source.unlink()

    def read(self, location: str, offset_bytes: int = 0) -> Iterator[bytes]:
        if location not in self._blobs:
            raise FileNotFoundError(location)
        data = self._blobs[location][0]
        for start in range(offset_bytes, len(data), 1 << 20):
            yield data[start : start + (1 << 20)]

    def whole(self, location: str, size_bytes: int) -> bytes:
        return b"".join(self.read(location))

    def at_hand(self, location: str, into: memoryview) -> bool:
        data = self.whole(location, len(into)) if location in self._blobs else b""
        into[: len(data)] = data[: len(into)]
        return location in self._blobs and len(data) >= len(into)

    def delete(self, location: str) -> None:
        self._blobs.pop(location, None)

    def locations(self) -> Iterator[tuple[str, datetime]]:
        return iter([(location, written) for location, (_, written) in self._blobs.items()])


@pytest.fixture(params=["memory", "folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "memory":
        return MemoryBlobs()
    if request.param == "folder":
        return FolderBlobs(tmp_path / "blobs")
    from obstore.store import S3Store

    endpoint = request.getfixturevalue("s3_url")
    s3 = S3Store(
        "blobs",
        prefix=tmp_path.name,
        endpoint=endpoint,
        region="us-east-1",
        access_key_id="any",
        secret_access_key="any",
        client_options={"allow_http": True},
        virtual_hosted_style_request=False,
    )
    return ObjectBlobs(s3)
