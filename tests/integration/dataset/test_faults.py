"""Decoders that die, callers that leave, readers that are slow: each costs its own call at most."""

import itertools
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from veneer.dataset.v1 import dataset_service_pb2 as pb

from .conftest import Service, StartService, freeze, lines, png, sha, upload

SLOWEST_S = 60


def until(holds: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + SLOWEST_S
    while not holds():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


@pytest.fixture
def dataset(service: Service) -> str:
    name = f"f{uuid.uuid4().hex[:12]}"
    service.stub().CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    return name


def decoders(service: Service) -> list[int]:
    children = Path(f"/proc/{service.process.pid}/task").glob("*/children")
    return [int(pid) for file in children for pid in file.read_text().split()]


@contextmanager
def deaths(service: Service, most: int | None = None) -> Iterator[list[int]]:
    """Kills decoders as soon as they are there: all, or so many."""
    killed: list[int] = []
    stop = threading.Event()

    def kill() -> None:
        while not stop.is_set() and (most is None or len(killed) < most):
            for pid in decoders(service):
                if pid not in killed and (most is None or len(killed) < most):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def test_a_decoder_that_is_killed_costs_nothing(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(tmp_path, "--decoders", "1")
    stub = service.stub()
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="d"))
    pictures = {f"{number}.png": png(1000 + number) for number in range(20)}
    rows = lines(*({"image": name, "text": name} for name in pictures))
    with deaths(service, 1) as killed:
        result = freeze(stub, "d", rows, pictures)
    assert len(killed) == 1
    assert result.version.report.accepted_rows == 20
    assert not result.codes


def test_a_picture_over_which_decoders_die_is_a_finding(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(tmp_path, "--decoders", "1")
    stub = service.stub()
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="d"))
    rows = lines({"image": "a.png", "text": "t"}, {"prompt": "p", "text": "t"})
    with deaths(service) as killed:
        result = freeze(stub, "d", rows, {"a.png": png(1)})
    assert len(killed) >= 2
    assert result.codes == ["PICTURE_DECODER_DIED"]
    assert result.version.report.accepted_rows == 1
    assert service.process.poll() is None
    again = freeze(stub, "d", rows, {"a.png": png(1)})  # that it died is not remembered
    assert not again.codes
    assert again.version.report.accepted_rows == 2


def test_a_picture_over_a_decoders_memory_is_a_finding(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(tmp_path, "--picture-memory-bytes", str(1 << 28))
    stub = service.stub()
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="d"))
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(out, "PNG")
    rows = lines({"image": "a.png", "text": "t"}, {"prompt": "p", "text": "t"})
    result = freeze(stub, "d", rows, {"a.png": out.getvalue()})
    assert set(result.codes) <= {"PICTURE_OVER_LIMIT", "PICTURE_DECODER_DIED", "PICTURE_BROKEN"}
    assert len(result.codes) == 1
    assert result.version.report.accepted_rows == 1
    assert service.process.poll() is None


def test_a_version_whose_caller_leaves_is_not_made(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(tmp_path)
    stub = service.stub()
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="d"))
    rows = lines(*({"prompt": f"q{number}", "text": "t" * 200} for number in range(150_000)))
    upload(stub, rows)
    request = pb.CreateDatasetVersionRequest(
        parent="datasets/d", row_files=[pb.RowFile(path="train.jsonl", digest=sha(rows))]
    )
    call = stub.CreateDatasetVersion(request)
    next(iter(call))
    until(lambda: any((service.data / "work").iterdir()), "the work began")
    call.cancel()
    until(lambda: not any((service.data / "work").iterdir()), "its working files are gone")
    assert not stub.ListDatasetVersions(pb.ListDatasetVersionsRequest(parent="datasets/d")).dataset_versions


def test_validate_only_keeps_nothing(service: Service, dataset: str) -> None:
    import base64

    stub = service.stub()
    inline = png(4321)
    row = {"image": "data:image/png;base64," + base64.b64encode(inline).decode(), "text": "t"}
    before = stub.GetDataset(pb.GetDatasetRequest(name=f"datasets/{dataset}"))
    result = freeze(stub, dataset, lines(row), validate_only=True)
    assert result.version.picture_count == 1
    assert result.version.picture_size_bytes == len(inline)
    assert stub.GetDataset(pb.GetDatasetRequest(name=f"datasets/{dataset}")) == before
    with pytest.raises(grpc.RpcError) as error:
        stub.GetDatasetVersion(pb.GetDatasetVersionRequest(name=result.version.name))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(stub.FindMissingBlobs(pb.FindMissingBlobsRequest(digests=[sha(inline)])).missing) == 1
    assert not any((service.data / "work").iterdir())
    kept = freeze(stub, dataset, lines(row))
    assert kept.version.digest == result.version.digest
    assert not stub.FindMissingBlobs(pb.FindMissingBlobsRequest(digests=[sha(inline)])).missing


def resident_bytes(service: Service) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def test_slow_readers_hold_the_server_back_and_leaving_ones_hold_nothing(service: Service, dataset: str) -> None:
    stub = service.stub()
    pictures = {f"{number}.png": png(number, 1000, 1000) for number in range(6)}  # 3 MB each
    rows = lines(*({"images": list(pictures), "text": f"t{number}"} for number in range(40)))  # 720 MB to send
    version = freeze(stub, dataset, rows, pictures).version
    request = pb.ReadExamplesRequest(dataset_version=version.name, split="train", picture_form=pb.PICTURE_FORM_ORIGINAL)
    before_bytes = resident_bytes(service)
    slow = stub.ReadExamples(request)
    next(iter(slow))
    most_bytes = 0
    for _ in range(30):
        most_bytes = max(most_bytes, resident_bytes(service) - before_bytes)
        time.sleep(0.05)
    assert most_bytes < 250 << 20  # two batches of 16 MiB and their messages, not all of it
    slow.cancel()
    for _ in range(40):  # more than the service has threads
        leaving = stub.ReadExamples(request)
        next(iter(leaving))
        leaving.cancel()
    whole = pb.ReadExamplesRequest(dataset_version=version.name, split="train")
    assert sum(1 for _ in stub.ReadExamples(whole)) == 40
    assert service.process.poll() is None


def test_an_upload_that_ends_in_the_middle_leaves_the_others_alone(service: Service) -> None:
    stub = service.stub()
    blobs = [uuid.uuid4().bytes * 40_000 for _ in range(8)]
    failures: list[BaseException] = []

    def send(blob: bytes, breaks: bool) -> None:
        try:
            if breaks:
                head = pb.UploadBlobsRequest(header=pb.BlobHeader(digest=sha(blob), size_bytes=len(blob)))
                stub.UploadBlobs(iter([head, pb.UploadBlobsRequest(data=blob[:1000])]))
            else:
                assert upload(stub, blob) == [sha(blob)]
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=send, args=(blob, breaks))
        for blob, breaks in itertools.product(blobs, (True, False, False))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not stub.FindMissingBlobs(pb.FindMissingBlobsRequest(digests=[sha(blob) for blob in blobs])).missing
