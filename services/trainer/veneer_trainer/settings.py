"""Settings of the trainer process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer_rpc import addresses
from veneer_rpc.names import ModelName, is_id
from veneer_rpc.settings import ServerSettings, setting


# ruff: noqa: RUF009  # setting() is dataclasses.field with a description
@dataclass(frozen=True, kw_only=True)
class TrainerSettings(ServerSettings):
    """What the trainer can be told; environment prefix VENEER_TRAINER_."""

    data: Path = setting("Folder of the database, checkpoints and adapters; made when missing.")
    models: str = setting("Bases, NAME=DIRECTORY, separated by commas.")
    dataset: str = setting("Address of the dataset service.")
    dataset_certificates_file: Path | None = setting("PEM of whom to trust there; turns TLS on.", None)
    delegation_key_file: Path = setting("PEM of the Ed25519 key that signs delegations.")
    redis: str | None = setting("redis://host:port/db or unix://path. Without it the queue is in this process.", None)
    tenant_weights: str = setting("Shares of turns, TENANT=WEIGHT, separated by commas; 1 for others.", "")
    max_queued: int = setting("Work of one kind that a tenant may have waiting.", 1000, 1, 1_000_000)
    max_queued_in_all: int = setting("Work of all kinds and tenants that may wait.", 10_000, 1, 10_000_000)
    max_leased: int = setting("Work that a tenant may have under lease at once.", 1000, 1, 1_000_000)
    lease_s: float = setting("A worker that is not heard of for so long has lost its lease.", 30.0, 0.1, 3600)
    heartbeat_s: float = setting("How often a worker is to be heard of.", 5.0, 0.05, 600)
    stall_s: float = setting("An attempt whose step does not grow for so long is dead.", 900.0, 0.1, 86_400)
    reconcile_s: float = setting("How often the queue is held against the database.", 5.0, 0.1, 600)
    max_deaths: int = setting("Attempts that may die without a new checkpoint in between.", 3, 1, 1000)
    max_retries: int = setting("Transient failures that are queued again.", 8, 0, 1000)
    retry_s: float = setting("Wait before the first retry; it doubles with each.", 5.0, 0.01, 3600)
    max_checkpoint_bytes: int = setting("Most bytes of a checkpoint.", 16 << 30, 1)
    max_adapter_bytes: int = setting("Most bytes of a published adapter.", 4 << 30, 1)
    max_export_bytes: int = setting("Most bytes of a published export.", 64 << 30, 1)
    metrics_port: int | None = setting(
        "Port on loopback where Prometheus reads /metrics; 0 takes a free one. Without it there is no such page.",
        None, 0, 65_535,
    )  # fmt: skip
    history_file: Path | None = setting("Appends what happened; for fault tests.", None)
    die_with_parent: bool = setting("End when the process that started this one ends.", False)

    @property
    def model_directories(self) -> dict[ModelName, Path]:
        """The directory of each base."""
        pairs = (entry.partition("=") for entry in self.models.split(",") if entry)
        return {ModelName(name): Path(directory) for name, _, directory in pairs}

    @property
    def weights(self) -> dict[str, float]:
        """The share of turns of tenants that are named."""
        pairs = (entry.partition("=") for entry in self.tenant_weights.split(",") if entry)
        return {tenant: float(weight) for tenant, _, weight in pairs}

    def problems(self) -> Iterator[str]:
        """See Settings."""
        yield from super().problems()
        if self.heartbeat_s * 2 > self.lease_s:
            yield f"heartbeat_s: must be at most half of lease_s ({self.lease_s}), was {self.heartbeat_s}"
        for entry in self.models.split(","):
            name, _, directory = entry.partition("=")
            if not is_id(name) or not directory or not Path(directory).is_dir():
                yield f"models: must be NAME=DIRECTORY with a directory that is there, was {entry!r}"
        for entry in self.tenant_weights.split(","):
            if entry and not _weighted(entry):
                yield f"tenant_weights: must be TENANT=WEIGHT with a weight above 0, was {entry!r}"
        if self.dataset_certificates_file is None and not addresses.is_local(self.dataset):
            yield f"dataset: {self.dataset} is another machine: give dataset_certificates_file"
        if not self.delegation_key_file.is_file():
            yield f"delegation_key_file: there is no file {self.delegation_key_file}"


def _weighted(entry: str) -> bool:
    tenant, _, weight = entry.partition("=")
    try:
        return is_id(tenant) and float(weight) > 0
    except ValueError:
        return False
