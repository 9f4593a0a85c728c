"""Settings of the worker process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer.trainer.v1 import worker_service_pb2
from veneer_rpc import addresses
from veneer_rpc.names import ModelName, is_id
from veneer_rpc.settings import Settings, setting

KINDS = {
    "training": worker_service_pb2.WORK_KIND_TRAINING,
    "evaluation": worker_service_pb2.WORK_KIND_EVALUATION,
    "export": worker_service_pb2.WORK_KIND_EXPORT,
}


# ruff: noqa: RUF009  # setting() is dataclasses.field with a description
@dataclass(frozen=True, kw_only=True)
class WorkerSettings(Settings):
    """What a worker can be told; environment prefix VENEER_WORKER_."""

    data: Path = setting("Folder of attempts under way, features of pictures and calibrations; made when missing.")
    name: str = setting("Its own name, stable over restarts.")
    models: str = setting("Bases, NAME=DIRECTORY, separated by commas.")
    trainer: str = setting("Address of the trainer service.")
    token_file: Path = setting("File with the token for the trainer, of role `worker`.")
    dataset: str = setting("Address of the dataset service.")
    inference: str = setting("Addresses of inference replicas, separated by commas; needed for evaluations.", "")
    certificates_file: Path | None = setting("PEM of whom to trust at other machines; turns TLS on.", None)
    device: Literal["auto", "cpu", "cuda"] = setting(
        "What training computes on; auto for an accelerator where torch finds one.", "auto"
    )
    threads: int = setting("Threads that training computes with, in each rank.", 1, 1, 1024)
    ranks: int = setting(
        "Processes that train a job together, started by torchrun; with cuda each has a GPU of its own.", 1, 1, 64
    )
    kinds: str = setting("Kinds of work to take, separated by commas.", "training,evaluation,export")
    export_prompts: int = setting("Prompts that an export is checked on.", 100, 1, 10_000)
    cache_bytes: int = setting("Most memory for rows, and again for features of pictures.", 2 << 30, 0)
    memory_bytes: int = setting("Memory that work may use; 0 for all of the machine's.", 0, 0)
    feature_disk_bytes: int = setting("Most disk for features of pictures, kept from job to job.", 4 << 30, 0)
    co_train_jobs: int = setting("Most jobs that share passes over the base.", 8, 1, 64)
    calibrate_idle_s: float = setting(
        "Seconds without work before the worker measures what shapes of jobs cost, for estimates.", 5.0, 0, 86_400
    )
    dataset_patience_s: float = setting(
        "An attempt gives up on a dataset service that is away so long.", 300.0, 0.1, 86_400
    )
    inference_patience_s: float = setting("Longest wait for absent replicas.", 300.0, 0.1, 86_400)
    grace_s: float = setting("Seconds that work under way gets to be given back after SIGTERM.", 30.0, 0, 3600)
    metrics_port: int | None = setting(
        "Port on loopback where Prometheus reads /metrics; 0 takes a free one. Without it there is no such page.",
        None, 0, 65_535,
    )  # fmt: skip
    die_with_parent: bool = setting("End when the process that started this one ends.", False)
    log_level: Literal["debug", "info", "warning", "error"] = setting("Least severe line to log.", "info")
    log_format: Literal["json", "console"] = setting("One JSON object a line, or text for people.", "json")

    @property
    def model_directories(self) -> dict[ModelName, Path]:
        """The directory of each base."""
        pairs = (entry.partition("=") for entry in self.models.split(",") if entry)
        return {ModelName(name): Path(directory) for name, _, directory in pairs}

    @property
    def replicas(self) -> list[str]:
        """Addresses of inference replicas."""
        return [address for address in self.inference.split(",") if address]

    @property
    def work_kinds(self) -> list[worker_service_pb2.WorkKind.ValueType]:
        """Kinds of work to ask for; evaluations only where there is somebody to ask."""
        kinds = [kind for kind in self.kinds.split(",") if kind != "evaluation" or self.replicas]
        return [KINDS[kind] for kind in kinds]

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        if not 1 <= len(self.name) <= 63:
            yield f"name: must be 1 to 63 characters, was {self.name[:80]!r}"
        for entry in self.models.split(","):
            name, _, directory = entry.partition("=")
            if not is_id(name) or not Path(directory).is_dir():
                yield f"models: must be NAME=DIRECTORY with a directory that is there, was {entry!r}"
        if unknown := set(self.kinds.split(",")) - KINDS.keys():
            yield f"kinds: must be of {', '.join(KINDS)}, was {', '.join(sorted(unknown))!r}"
        elif not self.replicas and self.kinds == "evaluation":
            yield "inference: must be given for evaluations"
        for place, address in [("trainer", self.trainer), ("dataset", self.dataset)] + [
            ("inference", address) for address in self.replicas
        ]:
            if self.certificates_file is None and not addresses.is_local(address):
                yield f"{place}: {address} is another machine: give certificates_file"
        for place, path in (("token_file", self.token_file), ("certificates_file", self.certificates_file)):
            if path is not None and not path.is_file():
                yield f"{place}: there is no file {path}"
