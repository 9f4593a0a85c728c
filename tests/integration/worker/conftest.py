"""A cluster of real processes without inference: dataset service, trainer and workers, on a tiny random base."""

import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from PIL import Image

from veneer.dataset.v1 import dataset_service_pb2 as dataset_pb
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1 import training_service_pb2 as jobs_pb
from veneer.trainer.v1.training_service_pb2_grpc import TrainerServiceStub
from veneer_rpc.delegation import new_key_pair
from veneer_rpc.tokens import add_token

Message = Answer = Any  # of generated code
Start = Any  # of the folder above
ROWS, VALIDATION_ROWS = 12, 4
LEASE_S = 5.0  # a busy machine holds a heartbeat back for seconds
# A job seconds long, so that there is time to interfere, with everything that a checkpoint must hold: dropout,
# moments, a schedule, validations and the best adapter so far.
LONG: dict[str, Any] = {
    "steps": 80,
    "validation_interval_steps": 20,
    "early_stopping": {"patience": 100},
    "lora": {"dropout": 0.1},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(holds: Callable[[], Any], timeout_s: float = 60.0) -> Answer:
    """Waits until something holds, and returns it."""
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)
    return found


class _Token(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
):
    def __init__(self, token: str) -> None:
        self._token = token

    def _call(self, continuation: Message, details: Message, request: Message) -> Answer:
        metadata = [("authorization", f"Bearer {self._token}")]
        return continuation(details._replace(metadata=metadata, wait_for_ready=True, timeout=60), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = _call


class Process:
    """A process that says in its first line that it is ready."""

    def __init__(
        self, start_process: Start, module: str, flags: dict[str, str], ready: str, log: Path, **variables: str
    ) -> None:
        self.log = log
        arguments = [text for name, value in flags.items() for text in (name, value)]
        with log.open("a") as file:
            self.process = start_process(module, arguments, file, **variables)
        line = self.process.stdout.readline()
        assert line.startswith(ready), log.read_text()[-4000:]

    @property
    def children(self) -> list[psutil.Process]:
        """A worker's: processes that compute, forked from one that waits to be."""
        if self.process.poll() is not None:
            return []
        return [child for server in psutil.Process(self.process.pid).children() for child in server.children()]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()


class Cluster:
    """Dataset service and trainer; workers come and go."""

    def __init__(self, folder: Path, base: Path, start_process: Start) -> None:
        self.folder, self.base, self._start_process = folder, base, start_process
        self.processes: list[Process] = []
        self._channels: dict[str, grpc.Channel] = {}
        private, public = new_key_pair()
        (folder / "delegation.pem").write_bytes(private)
        (folder / "public.pem").write_bytes(public)
        tokens, dataset_tokens = folder / "tokens.json", folder / "dataset-tokens.json"
        self.user = add_token(tokens, "acme", ["user"])
        self.dataset_user = add_token(dataset_tokens, "acme", ["user"])
        (folder / "worker.token").write_text(add_token(tokens, "system", ["worker"]) + "\n")
        (folder / "dataset.token").write_text(add_token(tokens, "system", ["service"]) + "\n")
        self.dataset = f"127.0.0.1:{free_port()}"
        self.trainer = f"127.0.0.1:{free_port()}"
        self._trainer_process = self.start_trainer()
        self.dataset_process = self.start_dataset()

    def start_dataset(self) -> Process:
        folder = self.folder
        return self._start(
            "veneer_dataset",
            {
                "--bind": self.dataset, "--tokens-file": str(folder / "dataset-tokens.json"),
                "--data": str(folder / "dataset"), "--trainer": self.trainer,
                "--trainer-token-file": str(folder / "dataset.token"),
                "--delegation-public-key-file": str(folder / "public.pem"), "--die-with-parent": "true",
            },
            "veneer_dataset listening on",
        )  # fmt: skip

    def start_trainer(self) -> Process:
        return self._start(
            "veneer_trainer",
            {
                "--bind": self.trainer, "--tokens-file": str(self.folder / "tokens.json"),
                "--data": str(self.folder / "trainer"), "--models": f"tiny={self.base}", "--dataset": self.dataset,
                "--delegation-key-file": str(self.folder / "delegation.pem"), "--lease-s": str(LEASE_S),
                "--heartbeat-s": "0.5", "--reconcile-s": "0.3", "--retry-s": "0.2", "--grace-s": "1",
                "--die-with-parent": "true",
            },
            "veneer_trainer listening on",
        )  # fmt: skip

    def restart_trainer(self) -> None:
        self._trainer_process.signal(signal.SIGKILL)
        self._trainer_process.wait()
        self._trainer_process = self.start_trainer()

    def worker(self, name: str = "w1", variables: dict[str, str] | None = None, **flags: str) -> Process:
        chosen = {f"--{flag.replace('_', '-')}": value for flag, value in flags.items()}
        return self._start(
            "veneer_trainer.worker",
            {
                "--data": str(self.folder / name), "--name": name, "--models": f"tiny={self.base}",
                "--trainer": self.trainer, "--token-file": str(self.folder / "worker.token"),
                "--dataset": self.dataset, "--threads": "1", "--die-with-parent": "true",
                "--calibrate-idle-s": "3600",
            } | chosen,
            f"veneer_worker {name} ready",
            variables,
        )  # fmt: skip

    def _start(
        self, module: str, flags: dict[str, str], ready: str, variables: dict[str, str] | None = None
    ) -> Process:
        log = self.folder / f"{module}.log"
        process = Process(self._start_process, module, flags, ready, log, **variables or {})
        self.processes.append(process)
        return process

    def jobs(self) -> TrainerServiceStub:
        return TrainerServiceStub(self.channel(self.trainer, self.user))

    def datasets(self) -> DatasetServiceStub:
        return DatasetServiceStub(self.channel(self.dataset, self.dataset_user))

    def channel(self, address: str, token: str) -> grpc.Channel:
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
        if address not in self._channels:
            self._channels[address] = grpc.insecure_channel(address, options)
        return grpc.intercept_channel(self._channels[address], _Token(token))

    def create(self, version: str, adapter: str, **values: Message) -> str:
        chosen = {
            "model": "models/tiny", "dataset_version": version, "adapter": f"adapters/{adapter}", "epochs": 2,
            "batch_size": 2, "gradient_accumulation": 2, "checkpoint_interval_steps": 1, "seed": 7,
            "dtype": "DTYPE_FLOAT32", "optimizer": {"learning_rate": 1e-2},
        } | values  # fmt: skip
        if "steps" in values:
            del chosen["epochs"]
        job = job_pb.TrainingJob(spec=job_pb.TrainingSpec(**chosen))
        name: str = self.jobs().CreateTrainingJob(jobs_pb.CreateTrainingJobRequest(training_job=job)).name
        return name

    def get(self, name: str) -> Answer:
        return self.jobs().GetTrainingJob(jobs_pb.GetTrainingJobRequest(name=name))

    def state(self, name: str) -> str:
        return job_pb.JobState.Name(self.get(name).state).removeprefix("JOB_STATE_")

    def ended(self, name: str, timeout_s: float = 90) -> Answer:
        """Waits for a job's terminal state and returns the job."""
        until(lambda: self.state(name) in ("SUCCEEDED", "FAILED", "CANCELLED", "DEAD_LETTERED"), timeout_s)
        return self.get(name)

    def digests(self, name: str) -> list[str]:
        """The digests of what workers published for a job."""
        lines = (self.folder / "veneer_trainer.worker.log").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return [each["digest"] for each in events if each["event"] == "adapter published" and each["work"] == name]

    def published(self, name: str) -> str:
        """The one digest of a job that is to succeed."""
        ended = self.ended(name)
        assert ended.adapter_version, ended.failure
        (digest,) = set(self.digests(name))
        return digest

    def at_step(self, name: str, least: int, attempts: int = 1) -> int:
        """Waits until a job's last attempt has come to a step, and trains; returns the step."""

        def there() -> bool:
            job = self.get(name)
            running = job.state == job_pb.JOB_STATE_RUNNING
            return running and len(job.attempts) == attempts and job.attempts[-1].last_step >= least

        until(there)
        step: int = self.get(name).progress.step
        return step

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        for process in reversed(self.processes):
            process.close()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, byte_base: Path, start_process: Start) -> Iterator[Cluster]:
    os.environ["OMP_NUM_THREADS"] = "1"
    made = Cluster(tmp_path_factory.mktemp("cluster"), byte_base, start_process)
    yield made
    made.close()


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64 + 32 * (seed % 3), 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def push(stub: DatasetServiceStub, dataset: str, files: dict[str, list[dict[str, str]]], model: str = "") -> str:
    """Makes a dataset of rows by file, whose pictures are named by their seed; returns the version's name.

    With a model its tokens are counted.
    """
    stub.CreateDataset(dataset_pb.CreateDatasetRequest(dataset_id=dataset))
    names = {row["image"] for rows in files.values() for row in rows if "image" in row}
    pictures = {name: picture(int(name.removesuffix(".png"))) for name in names}
    blobs = {path: "".join(json.dumps(row) + "\n" for row in rows).encode() for path, rows in files.items()}
    manifest = "".join(
        json.dumps({"path": name, "digest": hashlib.sha256(data).hexdigest()}) + "\n" for name, data in pictures.items()
    ).encode()

    def pieces() -> Iterator[dataset_pb.UploadBlobsRequest]:
        for data in {*pictures.values(), *blobs.values(), manifest}:
            header = dataset_pb.BlobHeader(digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
            yield dataset_pb.UploadBlobsRequest(header=header)
            yield dataset_pb.UploadBlobsRequest(data=data)

    stub.UploadBlobs(pieces())
    request = dataset_pb.CreateDatasetVersionRequest(
        parent=f"datasets/{dataset}",
        model=model,
        row_files=[
            dataset_pb.RowFile(path=path, digest=hashlib.sha256(data).hexdigest()) for path, data in blobs.items()
        ],
        picture_manifest=hashlib.sha256(manifest).hexdigest(),
    )
    *_, last = stub.CreateDatasetVersion(request)
    name: str = last.dataset_version.name
    return name


@pytest.fixture(scope="session")
def version(cluster: Cluster) -> str:
    train = [{"image": f"{n}.png", "prompt": "What number?", "text": f"The number is {n * 37}."} for n in range(ROWS)]
    validation = [
        {"image": f"{n}.png", "prompt": "What number?", "text": f"The number is {n * 41}."}
        for n in range(100, 100 + VALIDATION_ROWS)
    ]
    return push(cluster.datasets(), "numbers", {"train.jsonl": train, "validation.jsonl": validation})


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, version: str) -> str:
    """The digest of the long job's adapter when nothing happens to it."""
    worker = cluster.worker("undisturbed")
    job = cluster.create(version, "undisturbed", **LONG)
    assert cluster.ended(job).adapter_version, cluster.get(job).failure
    worker.close()
    (digest,) = cluster.digests(job)
    return digest
