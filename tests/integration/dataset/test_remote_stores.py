"""The whole service with its metadata in PostgreSQL and its blobs in S3: push, read, start again, delete, collect."""

import time
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa

from veneer.dataset.v1 import dataset_service_pb2 as pb

from .conftest import StartService, freeze, lines, png, sha


def test_push_read_and_delete(
    start_service: StartService,
    s3_url: str,
    postgresql_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from obstore.store import S3Store

    engine = sa.create_engine(postgresql_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("CREATE DATABASE service"))
    engine.dispose()
    for name, value in {"ENDPOINT": s3_url, "ALLOW_HTTP": "true", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "any")
    flags = ["--database", postgresql_url.replace("/postgres?", "/service?"), "--blobs", "s3://blobs/service"]
    flags += ["--grace-of-blobs-s", "3", "--collect-every-s", "0.2"]

    def keys() -> set[str]:
        store = S3Store("blobs", prefix="service", client_options={"allow_http": True})
        return {meta["path"] for page in store.list() for meta in page}

    service = start_service(tmp_path, *flags)
    stub = service.stub()
    pictures = {f"{seed}.png": png(seed) for seed in range(3)}
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="far"))
    rows = lines(*({"image": path, "text": f"t{path}"} for path in pictures), {"image": "none.png", "text": "x"})
    made = freeze(stub, "far", rows, pictures)
    assert made.codes == ["PICTURE_MISSING"]
    assert made.version.report.accepted_rows == 3
    assert not (service.data / "blobs").exists()
    assert not (service.data / "metadata.sqlite").exists()

    service.process.terminate()
    service.process.wait(30)
    service = start_service(tmp_path, *flags)
    stub = service.stub()
    request = pb.ReadExamplesRequest(
        dataset_version=made.version.name, split="train", picture_form=pb.PICTURE_FORM_ORIGINAL
    )
    read = {each.example.messages[0].parts[0].picture.data for each in stub.ReadExamples(request)}
    assert read == set(pictures.values())
    found = stub.ListFindings(pb.ListFindingsRequest(parent=made.version.name)).findings
    assert [(each.code, each.line) for each in found] == [("PICTURE_MISSING", 4)]

    again = freeze(stub, "far", rows, pictures)
    assert again.version.name == made.version.name
    assert {sha(data) for data in pictures.values()} <= {key.rpartition("/")[2][:64] for key in keys()}

    stub.DeleteDatasetVersion(pb.DeleteDatasetVersionRequest(name=made.version.name))
    with pytest.raises(grpc.RpcError) as gone:
        stub.GetDatasetVersion(pb.GetDatasetVersionRequest(name=made.version.name))
    assert gone.value.code() is grpc.StatusCode.NOT_FOUND
    deadline_s = time.monotonic() + 30
    while keys():
        assert time.monotonic() < deadline_s, keys()
        time.sleep(0.2)
    service.process.terminate()
    service.process.wait(30)
