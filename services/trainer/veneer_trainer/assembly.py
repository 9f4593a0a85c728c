"""How the trainer's parts are put together; `__main__` runs them, nothing else chooses an adapter."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from veneer.trainer.v1 import (
    adapter_service_pb2_grpc,
    evaluation_service_pb2_grpc,
    model_service_pb2_grpc,
    training_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from veneer_rpc.certificate import CertificateSigner
from veneer_rpc.channel import open_channel
from veneer_rpc.delegation import new_key_pair
from veneer_rpc.names import AdapterVersionName
from veneer_rpc.paging import Paginator
from veneer_trainer.adapters import evaluation_store, registry_store, requests, serving_store, work_store
from veneer_trainer.adapters.adapter_files import AdapterFiles, ExportFiles
from veneer_trainer.adapters.checkpoint_files import CheckpointFiles
from veneer_trainer.adapters.database import Database
from veneer_trainer.adapters.dataset_client import DatasetClient
from veneer_trainer.adapters.delegation import LIFETIME_S, SignedDelegations
from veneer_trainer.adapters.event_files import EventFiles
from veneer_trainer.adapters.history import FileHistory
from veneer_trainer.adapters.memory_queue import MemoryQueue
from veneer_trainer.adapters.metrics import CountedHistory, WorkCollector
from veneer_trainer.adapters.model_directories import ModelDirectories
from veneer_trainer.adapters.received_files import remove_incoming
from veneer_trainer.adapters.redis_queue import RedisQueue
from veneer_trainer.api.adapter_import import AdapterImport
from veneer_trainer.api.adapter_servicer import AdapterServicer
from veneer_trainer.api.changes import REGISTRY, WAITING_WORK, Changes
from veneer_trainer.api.evaluation_convert import evaluation_to_proto
from veneer_trainer.api.evaluation_servicer import EvaluationServicer
from veneer_trainer.api.export_convert import export_to_proto
from veneer_trainer.api.job_convert import job_to_proto
from veneer_trainer.api.model_servicer import ModelServicer
from veneer_trainer.api.training_servicer import TrainingServicer
from veneer_trainer.api.worker_servicer import LeaseTimes, WorkerServicer
from veneer_trainer.domain.admission import Admission
from veneer_trainer.domain.attempts import Attempts
from veneer_trainer.domain.canaries import Canaries
from veneer_trainer.domain.dispatch import Dispatch
from veneer_trainer.domain.evaluating import Evaluations
from veneer_trainer.domain.exporting import Exports
from veneer_trainer.domain.exports import export_of
from veneer_trainer.domain.leases import ChangeWatch
from veneer_trainer.domain.publishing import Publishing
from veneer_trainer.domain.registry import Adapters
from veneer_trainer.domain.replicas import Replicas
from veneer_trainer.domain.retries import RetryPolicy
from veneer_trainer.domain.training import TrainingJobs
from veneer_trainer.domain.upkeep import Upkeep
from veneer_trainer.domain.usage import users
from veneer_trainer.domain.work import Work, WorkKind
from veneer_trainer.domain.workers import Workers
from veneer_trainer.ports import WorkQueue
from veneer_trainer.settings import TrainerSettings

_PACKAGE = "veneer.trainer.v1"
SERVICES = tuple(f"{_PACKAGE}.{each}Service" for each in ("Adapter", "Evaluation", "Model", "Trainer", "Worker"))
ROLES = {
    f"{_PACKAGE}.WorkerService": {"worker"},
    f"{_PACKAGE}.ModelService": {"user", "service", "worker", "replica"},
    f"{_PACKAGE}.AdapterService/DownloadAdapterVersion": {"user", "replica", "worker"},
    f"{_PACKAGE}.AdapterService/WatchAdapters": {"user", "replica"},
    f"{_PACKAGE}.AdapterService/ReportServing": {"replica"},
}
_SCHEMAS = [each.SCHEMA for each in (work_store, requests, registry_store, evaluation_store, serving_store)]


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs: servicers to register, and what is done again and again, with the seconds in between."""

    servicers: list[Callable[[grpc.aio.Server], None]]
    rounds: list[tuple[Callable[[], None], float]]
    channel: grpc.aio.Channel
    database: Database
    history: FileHistory
    metrics: CollectorRegistry

    async def close(self) -> None:
        """Closes what is open."""
        await self.channel.close()
        self.database.close()
        self.history.close()


def assemble(settings: TrainerSettings, loop: asyncio.AbstractEventLoop) -> Parts:
    """Puts everything together and clears what a dead process left half done; call it on the loop's thread.

    Raises:
        ProcessingError, DigestError, OSError: a base cannot be read.
    """
    settings.data.mkdir(parents=True, exist_ok=True)
    changes, file, metrics = Changes(loop), FileHistory(settings.history_file, "trainer"), CollectorRegistry()
    history = CountedHistory(file, metrics)
    database = Database(settings.data / "trainer.db", _SCHEMAS)
    store = work_store.SqlWorkStore(database, changes.notify, max_queued_in_all=settings.max_queued_in_all)
    registry = registry_store.SqlRegistry(database, lambda: changes.notify(REGISTRY))
    asked = requests.SqlRequests(database)
    queue: WorkQueue = RedisQueue(settings.redis, settings.weights) if settings.redis else MemoryQueue(settings.weights)
    checkpoints = CheckpointFiles(settings.data / "checkpoints", settings.max_checkpoint_bytes)
    curves = EventFiles(settings.data / "metrics")
    incoming = settings.data / "incoming"
    remove_incoming(incoming)
    folders = AdapterFiles(settings.data / "adapters")
    folders.keep_only(registry.version_uids())
    delegations = SignedDelegations(settings.delegation_key_file)
    trusted = settings.dataset_certificates_file
    channel = open_channel(settings.dataset, root_certificates_pem=trusted.read_bytes() if trusted else None)
    datasets = DatasetClient(channel, delegations.for_trainer, loop)
    catalog = ModelDirectories(settings.model_directories)
    workers, replicas = Workers(), Replicas()
    metrics.register(WorkCollector(store, workers))
    publishing = Publishing(registry, folders, catalog, asked)
    retries = RetryPolicy(settings.max_deaths, settings.max_retries, settings.retry_s)
    dispatch = Dispatch(
        store, queue, retries, ChangeWatch(settings.lease_s / 2), history,
        settings.lease_s, settings.stall_s, settings.max_leased, lambda: changes.notify(WAITING_WORK),
    )  # fmt: skip
    samples = evaluation_store.SqlEvaluations(database)
    canaries = Canaries(registry, serving_store.SqlServing(database), samples)
    evaluations = Evaluations(
        store, samples, registry, catalog, datasets, asked, dispatch, settings.max_queued, canaries.judged,
    )  # fmt: skip
    attempts = Attempts(store, dispatch, retries, checkpoints, curves, publishing, evaluations, history)
    jobs = TrainingJobs(
        store, asked, Admission(catalog, datasets, publishing, workers), datasets, checkpoints, curves, dispatch,
        history, settings.max_queued,
    )  # fmt: skip
    signer = CertificateSigner(_export_key(settings.data))
    exports = Exports(
        store, registry, datasets, ExportFiles(settings.data / "exports"), asked, dispatch, attempts, signer,
        settings.max_queued,
    )  # fmt: skip
    exports.clear()
    adapters = Adapters(registry, folders, catalog, asked, partial(users, store), evaluations.figures)

    def fill_training(work: Work, lease: worker_service_pb2.Lease) -> None:
        lease.training_job.CopyFrom(job_to_proto(jobs.view(work)))

    def fill_evaluation(work: Work, lease: worker_service_pb2.Lease) -> None:
        lease.evaluation.CopyFrom(evaluation_to_proto(evaluations.view(work)))

    def fill_export(work: Work, lease: worker_service_pb2.Lease) -> None:
        lease.export.CopyFrom(export_to_proto(export_of(work)))

    def evaluated(tenant: str, version: AdapterVersionName) -> list[str]:
        found = store.page(tenant, WorkKind.EVALUATION, None, 100, (), str(version))
        return [work.ref.name for work in found]

    times = LeaseTimes(settings.lease_s, settings.heartbeat_s, settings.stall_s, LIFETIME_S)
    fillers = {WorkKind.TRAINING: fill_training, WorkKind.EVALUATION: fill_evaluation, WorkKind.EXPORT: fill_export}
    paginator = Paginator(_page_key(settings.data))
    imports = AdapterImport(publishing, catalog, incoming, settings.max_adapter_bytes)
    servicers: list[tuple[Callable[..., Any], Any]] = [
        (
            training_service_pb2_grpc.add_TrainerServiceServicer_to_server,
            TrainingServicer(jobs, paginator, changes),
        ),
        (
            worker_service_pb2_grpc.add_WorkerServiceServicer_to_server,
            WorkerServicer(
                dispatch, attempts, workers, checkpoints, delegations, changes, fillers, evaluations, exports, times,
                incoming, settings.max_adapter_bytes, settings.max_export_bytes,
            ),
        ),
        (
            adapter_service_pb2_grpc.add_AdapterServiceServicer_to_server,
            AdapterServicer(adapters, registry, imports, replicas, canaries, evaluated, exports, paginator, changes),
        ),
        (
            model_service_pb2_grpc.add_ModelServiceServicer_to_server,
            ModelServicer(catalog, workers, replicas, paginator),
        ),
        (
            evaluation_service_pb2_grpc.add_EvaluationServiceServicer_to_server,
            EvaluationServicer(evaluations, paginator, changes),
        ),
    ]  # fmt: skip
    upkeep = Upkeep(store, datasets, checkpoints)
    upkeep.checkpoints()
    rounds: list[tuple[Callable[[], None], float]] = [
        (dispatch.sweep, settings.lease_s / 8),
        (dispatch.reconcile, settings.reconcile_s),
        (upkeep.holds, settings.reconcile_s),
    ]
    return Parts([partial(add, servicer) for add, servicer in servicers], rounds, channel, database, file, metrics)


def _page_key(data: Path) -> bytes:
    """Returns the secret of page tokens, made at the first start."""
    path = data / "page.key"
    if not path.exists():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    return path.read_bytes()


def _export_key(data: Path) -> bytes:
    """Returns the key that signs exports' certificates, made at the first start; its public half lies beside it."""
    path, public_path = data / "export.key", data / "export-public.pem"
    if not path.exists():
        private, public = new_key_pair()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
        public_path.write_bytes(public)
    return path.read_bytes()
