"""Exports over real connections: order, lease, publish, certificate, download, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.numpy import save

from veneer.trainer.v1 import adapter_service_pb2 as pb
from veneer.trainer.v1 import export_pb2, model_pb2, worker_service_pb2
from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer_digests import model_digest
from veneer_rpc.certificate import CertificateError, verify

# What the conftest makes; a conftest cannot be imported.
Trainer = Worker = Datasets = Kit = Make = Adapters = Act = Message = Answer = Any
Code = grpc.StatusCode
VERSION = "adapters/digits/versions/1"


@pytest.fixture
def trainer(make_trainer: Make) -> Trainer:
    """One whose leases outlast a busy machine."""
    started = make_trainer(lease_s="60")
    started.start()
    return started


@pytest.fixture
def exporting(trainer: Trainer, worker: Worker, kit: Kit) -> Adapters:
    """A registry with one version, and its stub."""
    kit.create(trainer.jobs())
    attempt = worker.acquire(10).attempt
    worker.publish(attempt, kit.peft_folder())
    worker.finish(attempt)
    return trainer.adapters()


def refusal(act: Act) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    return caught.value.code(), info.reason


def order(adapters: Adapters, request_id: str = "", **values: Message) -> Answer:
    chosen = {"adapter_version": VERSION, "format": export_pb2.EXPORT_FORMAT_MERGED} | values
    request = pb.ExportAdapterVersionRequest(spec=export_pb2.ExportSpec(**chosen), request_id=request_id)
    return adapters.ExportAdapterVersion(request, timeout=20)


@pytest.fixture(scope="session")
def model(base: Path) -> dict[str, bytes]:
    """A folder that is a model, as far as digests go."""
    weights = save({"weight": np.arange(1000, dtype=np.float32)})
    return {"config.json": (base / "config.json").read_bytes(), "model.safetensors": weights, "tokenizer.json": b"{}"}


@pytest.fixture
def digest(model: dict[str, bytes], tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in model.items():
        (folder / name).write_bytes(data)
    return model_digest(folder)


def publish(
    worker: Worker, kit: Kit, attempt: Message, contents: dict[str, bytes], digest: str, measured: bytes = b"{}"
) -> Answer:
    header = worker_service_pb2.PublishExportHeader(
        attempt=attempt, digest=digest, files=kit.files_of(contents), statement=measured
    )
    pieces = kit.pieces(worker_service_pb2.PublishExportRequest, header, contents, 1 << 20)
    return worker.stub.PublishExport(pieces, timeout=60)


def download(adapters: Adapters, name: str, folder: Path, **request: Message) -> None:
    for piece in adapters.DownloadExport(pb.DownloadExportRequest(name=name, **request), timeout=60):
        path = folder / piece.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(piece.data)


def get(adapters: Adapters, name: str) -> Answer:
    return adapters.GetExport(pb.GetExportRequest(name=name), timeout=20)


def test_an_export_goes_from_order_to_a_folder_whose_certificate_holds(
    trainer: Trainer, worker: Worker, kit: Kit, exporting: Adapters, model: dict[str, bytes], digest: str,
    datasets: Datasets, tmp_path: Path,
) -> None:  # fmt: skip
    made = order(exporting, "5d30ae9b-24a8-4bd0-8b27-5a1d95a24b5c")
    assert order(exporting, "5d30ae9b-24a8-4bd0-8b27-5a1d95a24b5c").name == made.name
    assert (made.state, made.spec.dtype, made.spec.check_split) == (
        job_pb.JOB_STATE_QUEUED, model_pb2.DTYPE_FLOAT32, "test",
    )  # fmt: skip
    assert (made.model, made.dataset_version) == ("models/tiny", kit.VERSION)
    assert made.name in datasets.holders
    lease = worker.acquire(10)
    assert lease.export == exporting.GetExport(pb.GetExportRequest(name=made.name))
    assert lease.export.adapter_digest == kit.digest_of(kit.peft_folder())
    assert (lease.tenant, lease.export.spec.adapter_version) == ("acme", VERSION)
    worker.beat(lease.attempt, share_done=0.5)
    assert get(exporting, made.name).progress == 0.5
    assert refusal(lambda: worker.finish(lease.attempt)) == (Code.FAILED_PRECONDITION, "NOT_PUBLISHED")
    publish(worker, kit, lease.attempt, model, digest, b'{"prompts": 100}')
    again = publish(worker, kit, lease.attempt, model, digest, b'{"prompts": 7}')
    assert not again.files  # it shows its files once it has succeeded
    assert worker.finish(lease.attempt) == job_pb.JOB_STATE_SUCCEEDED
    kit.until(lambda: made.name not in datasets.holders)
    found = get(exporting, made.name)
    assert (found.state, found.digest, found.progress) == (job_pb.JOB_STATE_SUCCEEDED, digest, 1.0)
    assert [file.path for file in found.files] == sorted([*model, "certificate.json", "signer.pem"])
    # That it holds its data no more is written down a moment later.
    listed = pb.ListExportsRequest(adapter_version=VERSION)
    kit.until(lambda: exporting.ListExports(listed).exports == [get(exporting, made.name)])

    folder = tmp_path / "export"
    download(exporting, found.name, folder)
    public = Path(trainer.flags["data"]) / "export-public.pem"
    certified = verify(folder, public.read_bytes())
    assert (folder / "certificate.json").read_bytes() == found.certificate
    assert certified.predicate["measured"] == {"prompts": 100}
    assert certified.predicate["adapter_digest"] == made.adapter_digest
    assert (certified.predicate["digest"], certified.predicate["code_version"]) == (digest, "0.1")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(CertificateError, match=r"model.safetensors has SHA-256"):
        verify(folder)
    part = tmp_path / "part"
    download(exporting, found.name, part, paths=["config.json"], offset_bytes=5)
    assert (part / "config.json").read_bytes() == model["config.json"][5:]

    trainer.kill()
    trainer.start()  # the key and the files outlast the process
    download(exporting, found.name, tmp_path / "again")
    verify(tmp_path / "again", public.read_bytes())
    exporting.DeleteExport(pb.DeleteExportRequest(name=found.name))
    assert refusal(lambda: get(exporting, found.name))[0] == Code.NOT_FOUND
    assert not list((Path(trainer.flags["data"]) / "exports").iterdir())


def test_what_is_damaged_or_foreign_is_not_published(
    trainer: Trainer, worker: Worker, kit: Kit, exporting: Adapters, model: dict[str, bytes], digest: str
) -> None:
    name = order(exporting).name
    attempt = worker.acquire(10).attempt
    tampered = model | {"model.safetensors": model["model.safetensors"][:-1] + b"\x7f"}
    assert refusal(lambda: publish(worker, kit, attempt, tampered, digest)) == (Code.DATA_LOSS, "EXPORT_DAMAGED")
    own = model | {"certificate.json": b"{}"}
    assert refusal(lambda: publish(worker, kit, attempt, own, digest)) == (Code.INVALID_ARGUMENT, "INVALID_FIELDS")
    assert refusal(lambda: publish(worker, kit, attempt, model, digest, b"[]"))[0] == Code.INVALID_ARGUMENT
    broken = model | {"model.safetensors": b"\xff" * 16}
    assert refusal(lambda: publish(worker, kit, attempt, broken, digest)) == (
        Code.FAILED_PRECONDITION, "EXPORT_UNFIT",
    )  # fmt: skip

    def half() -> Iterator[Any]:
        header = worker_service_pb2.PublishExportHeader(
            attempt=attempt, digest=digest, files=kit.files_of(model), statement=b"{}"
        )
        stream = kit.pieces(worker_service_pb2.PublishExportRequest, header, model)
        yield next(stream)
        yield next(stream)

    assert refusal(lambda: worker.stub.PublishExport(half(), timeout=20)) == (Code.DATA_LOSS, "FILE_DAMAGED")
    stale = worker_service_pb2.AttemptRef(work=name, fencing_token=attempt.fencing_token - 1)
    assert refusal(lambda: publish(worker, kit, stale, model, digest)) == (Code.ABORTED, "STALE_TOKEN")
    data = Path(trainer.flags["data"])
    assert not list((data / "exports").iterdir())
    kit.until(lambda: not list((data / "incoming").glob("*")))
    failed = {"reason": "EXPORT_DIFFERS", "message": "3 answers differ", "transient": False}
    assert worker.finish(attempt, failed=failed) == job_pb.JOB_STATE_FAILED
    assert get(exporting, name).failure.reason == "EXPORT_DIFFERS"
    download_of_it = pb.DownloadExportRequest(name=name)
    assert refusal(lambda: list(exporting.DownloadExport(download_of_it)))[1] == "NOT_EXPORTED"


def test_orders_out_of_bounds_are_refused_and_a_version_in_use_is_kept(
    worker: Worker, kit: Kit, exporting: Adapters
) -> None:
    assert refusal(lambda: order(exporting, dtype=model_pb2.DTYPE_INT8))[0] == Code.INVALID_ARGUMENT
    assert refusal(lambda: order(exporting, format=export_pb2.EXPORT_FORMAT_GGUF))[0] == Code.INVALID_ARGUMENT
    assert refusal(lambda: order(exporting, check_split="none"))[0] == Code.INVALID_ARGUMENT
    unknown = "adapters/digits/versions/9"
    assert refusal(lambda: order(exporting, adapter_version=unknown))[0] == Code.NOT_FOUND
    made = order(exporting, check_split="validation")
    removal = pb.DeleteAdapterVersionRequest(name=VERSION)
    exporting.DeleteAlias(pb.DeleteAliasRequest(adapter="adapters/digits", alias="production"))
    assert refusal(lambda: exporting.DeleteAdapterVersion(removal)) == (Code.FAILED_PRECONDITION, "VERSION_IN_USE")
    deletion = pb.DeleteExportRequest(name=made.name)
    assert refusal(lambda: exporting.DeleteExport(deletion)) == (Code.FAILED_PRECONDITION, "WRONG_STATE")
    cancelled = exporting.CancelExport(pb.CancelExportRequest(name=made.name))
    assert cancelled.state == job_pb.JOB_STATE_CANCELLED
    exporting.DeleteExport(deletion)
    exporting.DeleteAdapterVersion(removal)


def test_a_worker_reads_the_version_of_the_tenant_that_it_works_for(
    worker: Worker, trainer: Trainer, kit: Kit, exporting: Adapters
) -> None:
    as_worker = trainer.adapters(trainer.keys.worker)
    request = pb.DownloadAdapterVersionRequest(name=VERSION, tenant="acme")
    assert refusal(lambda: list(as_worker.DownloadAdapterVersion(request)))[0] == Code.NOT_FOUND  # no work names it
    order(exporting)
    contents: dict[str, bytes] = {}
    for piece in as_worker.DownloadAdapterVersion(request, timeout=20):
        contents[piece.path] = contents.get(piece.path, b"") + piece.data
    assert contents == kit.peft_folder()
    assert json.loads(contents["adapter_config.json"])["r"] == 8
