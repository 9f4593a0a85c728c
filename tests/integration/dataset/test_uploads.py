"""Uploads on a live server: what may go wrong, and that the next good call passes each time."""

import hashlib
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from veneer.dataset.v1 import dataset_service_pb2 as pb

from .conftest import Service, StartService, freeze, lines, png, sha, upload

H, D = pb.BlobHeader, pb.UploadBlobsRequest


def header(data: bytes, size: int | None = None, offset: int = 0, digest: str = "") -> D:
    return D(header=H(digest=digest or sha(data), size_bytes=len(data) if size is None else size, offset_bytes=offset))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda data: [header(data, digest="0" * 64), D(data=data)], grpc.StatusCode.DATA_LOSS),
        (lambda data: [header(data, size=10), D(data=data)], grpc.StatusCode.OUT_OF_RANGE),
        (lambda data: [header(data, offset=5), D(data=data[5:])], grpc.StatusCode.OUT_OF_RANGE),
        (lambda data: [header(data, offset=10**6), D(data=data)], grpc.StatusCode.OUT_OF_RANGE),
        (lambda data: [D(data=data)], grpc.StatusCode.INVALID_ARGUMENT),
        (lambda data: [D()], grpc.StatusCode.INVALID_ARGUMENT),
        (lambda data: [header(data), header(data)], grpc.StatusCode.INVALID_ARGUMENT),
        (lambda data: [header(data, digest="xyz")], grpc.StatusCode.INVALID_ARGUMENT),
        (lambda data: [header(data, size=-1)], grpc.StatusCode.INVALID_ARGUMENT),
        (lambda data: [header(data, size=2**33)], grpc.StatusCode.INVALID_ARGUMENT),
        (lambda data: [header(data, size=2**22), D(data=b"x" * (2**20 + 1))], grpc.StatusCode.INVALID_ARGUMENT),
        (lambda data: [header(data, size=2**23), D(data=b"x" * (2**22 + 1))], grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_refused_and_the_next_one_passes(service: Service, make: object, code: grpc.StatusCode) -> None:
    stub, data = service.stub(), uuid.uuid4().bytes * 10
    with pytest.raises(grpc.RpcError) as error:
        stub.UploadBlobs(iter(make(data)))  # type: ignore[operator]
    assert error.value.code() is code
    if code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert "/" not in error.value.details().replace("a/b", "")
    assert upload(stub, data) == [sha(data)]


def test_a_broken_upload_goes_on_where_it_was(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(tmp_path)
    stub, data = service.stub(), bytes(range(256)) * 12_000

    def broken() -> Iterator[D]:
        yield header(data)
        for start in range(0, 2 << 20, 1 << 20):
            yield D(data=data[start : start + (1 << 20)])

    assert not stub.UploadBlobs(broken()).digests
    for kill in (False, True):
        if kill:
            service.process.kill()
            service.process.wait()
            stub = start_service(tmp_path).stub()
        missing = stub.FindMissingBlobs(pb.FindMissingBlobsRequest(digests=[sha(data)])).missing
        assert [each.received_bytes for each in missing] == [2 << 20]
    rest = [
        header(data, offset=2 << 20),
        *(D(data=data[start : start + (1 << 20)]) for start in range(2 << 20, len(data), 1 << 20)),
    ]
    assert list(stub.UploadBlobs(iter(rest)).digests) == [sha(data)]
    assert not stub.FindMissingBlobs(pb.FindMissingBlobsRequest(digests=[sha(data)])).missing
    pieces = list(stub.DownloadBlobs(pb.DownloadBlobsRequest(digests=[sha(data), sha(data)], offset_bytes=1000)))
    assert b"".join(piece.data for piece in pieces) == data[1000:] + data
    assert {piece.size_bytes for piece in pieces} == {len(data)}
    with pytest.raises(grpc.RpcError) as error:
        list(stub.DownloadBlobs(pb.DownloadBlobsRequest(digests=[sha(data)], offset_bytes=len(data) + 1)))
    assert error.value.code() is grpc.StatusCode.OUT_OF_RANGE


def test_many_blobs_an_empty_one_and_two_writers(service: Service) -> None:
    stub = service.stub()
    blobs = [f"blob {number} {uuid.uuid4()}".encode() for number in range(700)] + [b""]
    assert upload(stub, *blobs) == [sha(each) for each in blobs]
    assert upload(stub, *blobs) == [sha(each) for each in blobs]
    pieces = list(stub.DownloadBlobs(pb.DownloadBlobsRequest(digests=[sha(each) for each in blobs[-3:]])))
    assert [piece.data for piece in pieces] == blobs[-3:]
    kept = [path for path in (service.data / "blobs").rglob("*") if path.is_file() and path.name.startswith(sha(b""))]
    assert len(kept) == 1


def test_a_stalled_upload_ends(start_service: StartService, tmp_path: Path) -> None:
    stub = start_service(tmp_path, "--upload-stall-s", "0.3", "--quota-bytes", "100").stub()
    from threading import Event

    stop = Event()

    def stalled() -> Iterator[D]:
        yield header(b"abc")
        stop.wait(20)

    with pytest.raises(grpc.RpcError) as error:
        stub.UploadBlobs(stalled())
    stop.set()
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(grpc.RpcError) as error:
        upload(stub, b"x" * 101)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert upload(stub, b"x" * 90) == [hashlib.sha256(b"x" * 90).hexdigest()]


def test_what_nobody_names_is_collected(start_service: StartService, tmp_path: Path) -> None:
    stub = start_service(tmp_path, "--grace-of-blobs-s", "3600", "--collect-every-s", "0.1").stub()
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="d"))
    kept, loose, fresh = png(1), b"loose", b"fresh"
    freeze(stub, "d", lines({"image": "a.png", "text": "t"}), {"a.png": kept})
    upload(stub, loose)
    with closing(sqlite3.connect(tmp_path / "data/metadata.sqlite", timeout=60)) as database, database:
        database.execute("UPDATE blobs SET asked_us = asked_us - 7200 * 1000000")  # two hours pass
    upload(stub, fresh)
    while list((tmp_path / "data/blobs").rglob(f"{sha(loose)}*")):  # pytest's timeout ends it
        time.sleep(0.05)
    missing = stub.FindMissingBlobs(pb.FindMissingBlobsRequest(digests=[sha(kept), sha(loose), sha(fresh)])).missing
    assert [each.digest for each in missing] == [sha(loose)]
    pieces = stub.DownloadBlobs(pb.DownloadBlobsRequest(digests=[sha(kept)]))
    assert b"".join(each.data for each in pieces) == kept
