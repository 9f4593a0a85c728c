"""The trainer's process: settings in, parts wired, served until a signal."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import structlog

from veneer.trainer.v1 import (
    adapter_pb2,
    training_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from veneer_rpc import logs
from veneer_rpc.authentication import BearerAuthenticator
from veneer_rpc.channel import open_channel
from veneer_rpc.errors import Unavailable
from veneer_rpc.paging import Paginator
from veneer_rpc.parent import die_with_parent
from veneer_rpc.server import BindError, Server
from veneer_rpc.settings import SettingsError, load
from veneer_rpc.tokens import TokenFile, TokenFileError
from veneer_trainer.adapters import requests, work_store
from veneer_trainer.adapters.checkpoint_files import CheckpointFiles
from veneer_trainer.adapters.database import Database
from veneer_trainer.adapters.dataset_client import DatasetClient
from veneer_trainer.adapters.delegation import LIFETIME_S, SignedDelegations
from veneer_trainer.adapters.history import FileHistory
from veneer_trainer.adapters.memory_queue import MemoryQueue
from veneer_trainer.adapters.memory_registry import MemoryRegistry, NoEvaluations
from veneer_trainer.adapters.model_directories import ModelDirectories
from veneer_trainer.adapters.received_files import remove_incoming
from veneer_trainer.adapters.redis_queue import RedisQueue
from veneer_trainer.api.changes import WAITING_WORK, Changes
from veneer_trainer.api.job_convert import job_to_proto
from veneer_trainer.api.training_servicer import TrainingServicer
from veneer_trainer.api.worker_servicer import LeaseTimes, WorkerServicer
from veneer_trainer.domain.admission import Admission
from veneer_trainer.domain.attempts import Attempts
from veneer_trainer.domain.dispatch import Dispatch
from veneer_trainer.domain.leases import ChangeWatch
from veneer_trainer.domain.retries import RetryPolicy
from veneer_trainer.domain.training import TrainingJobs
from veneer_trainer.domain.upkeep import Upkeep
from veneer_trainer.domain.work import Work, WorkKind
from veneer_trainer.domain.workers import Workers
from veneer_trainer.ports import PublishedVersion, WorkQueue
from veneer_trainer.settings import TrainerSettings

_log = structlog.get_logger(__name__)
_THREADS = 32  # calls that may wait for the database, the disk or the dataset service at once
_ROLES = {"veneer.trainer.v1.WorkerService": {"worker"}}


async def serve(settings: TrainerSettings) -> None:
    """Runs the trainer until SIGTERM or SIGINT.

    Raises:
        BindError: the address cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(_THREADS, "work"))
    settings.data.mkdir(parents=True, exist_ok=True)
    changes, history = Changes(loop), FileHistory(settings.history_file, "trainer")
    database = Database(settings.data / "trainer.db", [work_store.SCHEMA, requests.SCHEMA])
    store = work_store.SqlWorkStore(database, changes.notify)
    queue: WorkQueue = RedisQueue(settings.redis, settings.weights) if settings.redis else MemoryQueue(settings.weights)
    checkpoints = CheckpointFiles(settings.data / "checkpoints", settings.max_checkpoint_bytes)
    incoming = settings.data / "incoming"
    remove_incoming(incoming)
    delegations = SignedDelegations(settings.delegation_key_file)
    trusted = settings.dataset_certificates_file
    channel = open_channel(settings.dataset, root_certificates_pem=trusted.read_bytes() if trusted else None)
    datasets = DatasetClient(channel, delegations.for_trainer, loop)
    catalog = await asyncio.to_thread(ModelDirectories, settings.model_directories)
    registry, workers = MemoryRegistry(), Workers()
    retries = RetryPolicy(settings.max_deaths, settings.max_retries, settings.retry_s)
    dispatch = Dispatch(
        store, queue, retries, ChangeWatch(settings.lease_s / 2), history,
        settings.lease_s, settings.stall_s, settings.max_leased, lambda: changes.notify(WAITING_WORK),
    )  # fmt: skip
    attempts = Attempts(store, dispatch, retries, checkpoints, registry, NoEvaluations(), history)
    jobs = TrainingJobs(
        store, requests.SqlRequests(database), Admission(catalog, datasets, registry, workers), datasets,
        checkpoints, dispatch, history, settings.max_queued,
    )  # fmt: skip

    def fill_training(work: Work, lease: worker_service_pb2.Lease) -> None:
        lease.training_job.CopyFrom(job_to_proto(jobs.view(work)))

    def version_to_proto(version: PublishedVersion) -> adapter_pb2.AdapterVersion:
        return adapter_pb2.AdapterVersion(name=str(version.name), digest=version.digest)

    times = LeaseTimes(settings.lease_s, settings.heartbeat_s, settings.stall_s, LIFETIME_S)
    worker_servicer = WorkerServicer(
        dispatch, attempts, workers, checkpoints, delegations, changes, {WorkKind.TRAINING: fill_training},
        version_to_proto, times, incoming, settings.max_adapter_bytes,
    )  # fmt: skip
    training_servicer = TrainingServicer(jobs, Paginator(page_key(settings.data)), changes)
    server = Server(
        settings,
        [
            partial(training_service_pb2_grpc.add_TrainerServiceServicer_to_server, training_servicer),
            partial(worker_service_pb2_grpc.add_WorkerServiceServicer_to_server, worker_servicer),
        ],
        BearerAuthenticator(TokenFile(settings.tokens_file)),
        _ROLES,
    )
    upkeep = Upkeep(store, datasets, checkpoints)
    await asyncio.to_thread(upkeep.checkpoints)
    address = await server.start()
    rounds = [
        asyncio.create_task(_again(dispatch.sweep, settings.lease_s / 8)),
        asyncio.create_task(_again(dispatch.reconcile, settings.reconcile_s)),
        asyncio.create_task(_again(upkeep.holds, settings.reconcile_s)),
    ]
    for service in ("veneer.trainer.v1.TrainerService", "veneer.trainer.v1.WorkerService"):
        server.health.set_serving(service, True)
    print(f"veneer_trainer listening on {address}", flush=True)
    try:
        await server.run()
    finally:
        for task in rounds:
            task.cancel()
        await asyncio.gather(*rounds, return_exceptions=True)
        await channel.close()
        database.close()
        history.close()


async def _again(act: Callable[[], None], every_s: float) -> None:
    """Does something now and then for ever; what fails is tried again the next time."""
    while True:
        try:
            await asyncio.to_thread(act)
        except Unavailable as error:
            _log.warning("round postponed", reason=error.reason, problem=str(error.__cause__ or error))
        except Exception:
            _log.exception("round failed")
        await asyncio.sleep(every_s)


def page_key(data: Path) -> bytes:
    """Returns the secret of page tokens, made at the first start."""
    path = data / "page.key"
    if not path.exists():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    return path.read_bytes()


def main() -> int:
    """Runs the process; returns its exit code."""
    try:
        settings = load(TrainerSettings, "VENEER_TRAINER_", sys.argv[1:], os.environ)
        logs.configure(settings.log_level, settings.log_format)
        if settings.die_with_parent:
            die_with_parent()
        asyncio.run(serve(settings))
    except (SettingsError, TokenFileError, BindError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
