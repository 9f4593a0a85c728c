# ruff: noqa: ANN401  # gRPC's interceptors and generated requests are untyped
"""A real dataset service as a process, and a stand-in for the trainer's ModelService on a real socket."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from veneer.dataset.v1 import dataset_pb2
from veneer.dataset.v1 import dataset_service_pb2 as pb
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer.trainer.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from veneer_base.unfold import base_directory
from veneer_rpc.delegation import new_key_pair
from veneer_rpc.tokens import add_token

Process = Any  # of the folder above
MODEL_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
MODEL_DIGEST = "ab" * 32
CONTEXT = 2048


class Models(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, directory: Path) -> None:
        self._data = {name: (directory / name).read_bytes() for name in MODEL_FILES}

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> model_pb2.Model:
        if request.name != "models/tiny":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        files = [
            model_pb2.ModelFile(path=name, digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
            for name, data in sorted(self._data.items())
        ]
        return model_pb2.Model(name="models/tiny", digest=MODEL_DIGEST, context_length=CONTEXT, files=files)

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> model_service_pb2.ListModelsResponse:
        return model_service_pb2.ListModelsResponse()  # a client that asks for no model by name gets none

    def DownloadModelFiles(
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[model_service_pb2.DownloadModelFilesResponse]:
        for name in request.paths:
            data = self._data[name]
            for start in range(0, len(data), 1 << 20):
                yield model_service_pb2.DownloadModelFilesResponse(
                    file=model_pb2.ModelFile(path=name), offset_bytes=start, data=data[start : start + (1 << 20)]
                )


@dataclass
class Service:
    address: str
    process: Process
    data: Path
    user: str
    stranger: str
    delegation_key: bytes

    def stub(self, token: str | None = None) -> DatasetServiceStub:
        return DatasetServiceStub(
            grpc.intercept_channel(grpc.insecure_channel(self.address), _Token(token or self.user))
        )


class _Token(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
):
    def __init__(self, token: str) -> None:
        self._token = token

    def _call(self, continuation: Any, details: Any, request: Any) -> Any:
        class Details(grpc.ClientCallDetails):
            method, timeout, credentials, wait_for_ready, compression = (
                details.method,
                details.timeout or 60,
                None,
                True,
                None,
            )
            metadata = (("authorization", f"Bearer {self._token}"),)

        return continuation(Details(), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _call


StartService = Callable[..., Service]


@pytest.fixture(scope="session")
def trainer() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(Models(base_directory()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.fixture(scope="session")
def start_service(trainer: str, start_process: Callable[..., Process]) -> Iterator[StartService]:
    """Starts a service on a folder; what was started is ended with the session."""
    started: list[Process] = []
    secrets: dict[Path, tuple[str, str, bytes]] = {}

    def start(folder: Path, *flags: str) -> Service:
        tokens, public = folder / "tokens.json", folder / "delegation-public.pem"
        if folder not in secrets:
            private_pem, public_pem = new_key_pair()
            public.write_bytes(public_pem)
            (folder / "trainer.token").write_text("vnr_any\n")
            secrets[folder] = add_token(tokens, "acme", ["user"]), add_token(tokens, "other", ["user"]), private_pem
        user, stranger, key = secrets[folder]
        command = ["--bind", "127.0.0.1:0", "--tokens-file", str(tokens)]
        command += ["--data", str(folder / "data"), "--trainer", trainer, "--die-with-parent", "true"]
        command += ["--trainer-token-file", str(folder / "trainer.token"), "--log-level", "warning"]
        command += ["--delegation-public-key-file", str(public), *flags]
        with (folder / "log").open("a") as log:
            process = start_process("veneer_dataset", command, log)
        started.append(process)
        line = process.stdout.readline()
        assert line.startswith("veneer_dataset listening on "), (folder / "log").read_text()
        return Service(line.split()[-1], process, folder / "data", user, stranger, key)

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.wait(30)
        process.stdout.close()


@pytest.fixture(scope="session")
def service(start_service: StartService, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return start_service(tmp_path_factory.mktemp("dataset"))


def png(seed: int = 0, width: int = 40, height: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def upload(stub: DatasetServiceStub, *blobs: bytes) -> list[str]:
    def pieces() -> Iterator[pb.UploadBlobsRequest]:
        for blob in blobs:
            yield pb.UploadBlobsRequest(header=pb.BlobHeader(digest=sha(blob), size_bytes=len(blob)))
            for start in range(0, len(blob), 1 << 20):
                yield pb.UploadBlobsRequest(data=blob[start : start + (1 << 20)])

    return list(stub.UploadBlobs(pieces()).digests)


def lines(*rows: object) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()) + b"\n" for row in rows
    )


@dataclass
class Result:
    findings: list[dataset_pb2.Finding]
    version: dataset_pb2.DatasetVersion
    phases: set[int]

    @property
    def codes(self) -> list[str]:
        return [each.code for each in self.findings]


def freeze(
    stub: DatasetServiceStub,
    dataset: str,
    rows: bytes,
    pictures: dict[str, bytes] | None = None,
    found: list[dataset_pb2.Finding] | None = None,
    path: str = "train.jsonl",
    **fields: Any,
) -> Result:
    """Uploads rows and pictures and makes a version; `found` gets the findings even where that fails."""
    pictures = pictures or {}
    manifest = lines(*({"path": name, "digest": sha(data)} for name, data in pictures.items()))
    upload(stub, rows, manifest, *pictures.values())
    request = pb.CreateDatasetVersionRequest(
        parent=f"datasets/{dataset}",
        row_files=[pb.RowFile(path=path, digest=sha(rows))],
        picture_manifest=sha(manifest) if pictures else "",
        **fields,
    )
    return collect(stub, request, found)


def collect(
    stub: DatasetServiceStub, request: pb.CreateDatasetVersionRequest, found: list[dataset_pb2.Finding] | None = None
) -> Result:
    result = Result([] if found is None else found, dataset_pb2.DatasetVersion(), set())
    for response in stub.CreateDatasetVersion(request):
        kind = response.WhichOneof("event")
        if kind == "progress":
            result.phases.add(response.progress.phase)
        elif kind == "findings":
            result.findings.extend(response.findings.findings)
        else:
            result.version = response.dataset_version
    assert result.version.name
    return result
