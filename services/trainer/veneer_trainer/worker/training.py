"""A training job under a lease: the child computes, this moves what it makes to the trainer."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import structlog

from veneer.trainer.v1 import (
    adapter_service_pb2_grpc,
    training_job_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from veneer_rpc.errors import FailedPrecondition, NotFound, VeneerError
from veneer_rpc.names import ModelName
from veneer_rpc.threads import in_thread
from veneer_trainer.worker import adapter_download, folders
from veneer_trainer.worker.attempt import Abandoned, Attempt, Order, failure
from veneer_trainer.worker.crew import Crew, Seat
from veneer_trainer.worker.device import Device
from veneer_trainer.worker.messages import (
    CheckpointMade,
    Failed,
    OfJob,
    Progressed,
    Resolved,
    Shared,
    Stopped,
    Task,
    Trained,
)
from veneer_trainer.worker.settings import WorkerSettings

_pb = worker_service_pb2
_log = structlog.get_logger(__name__)
_ORDER_S = 15.0  # for the order that explains a refused publish

Outcome = dict[str, object]


class TrainingWork:
    """One attempt at a training job.

    Args:
        settings: the process's.
        digests: of the bases it holds.
        device: to train on.
        service: the trainer.
        adapters: the trainer's registry.
        attempt: the lease.
        lease: what it is about.
        folder: the attempt's own; the caller removes it.
        crew: whom it trains with.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        digests: Mapping[ModelName, str],
        device: Device,
        service: worker_service_pb2_grpc.WorkerServiceAsyncStub,
        adapters: adapter_service_pb2_grpc.AdapterServiceAsyncStub,
        attempt: Attempt,
        lease: _pb.Lease,
        folder: Path,
        crew: Crew,
    ) -> None:
        self._settings = settings
        self._digests = digests
        self._device = device
        self._service = service
        self._adapters = adapters
        self._attempt = attempt
        self._lease = lease
        self._folder = folder
        self._crew = crew
        self._step = lease.checkpoint.step  # the last that the child told
        self._stepped = False  # whether there is something to lose
        self._dropped = False  # whether the child's part was ended without its answer
        self._made: CheckpointMade | None = None  # waits to be stored
        self._storing: asyncio.Task[None] | None = None

    async def run(self) -> Outcome | None:
        """Trains; returns the outcome to tell the trainer, None where there is nobody to tell.

        Raises:
            Abandoned: the attempt is not ours any more.
            VeneerError: the trainer refuses what the attempt needs.
        """
        seat = await self._crew.join(await self._task())
        self._attempt.on_delegation = seat.renew
        seat.renew(self._attempt.delegation)
        obeying = asyncio.create_task(self._obey(seat))
        try:
            last = await self._listen(seat)
            return await self._outcome(last, seat.status)
        finally:
            await seat.leave()
            for task in (obeying, self._storing):
                if task is not None:
                    task.cancel()

    async def _task(self) -> Task:
        job = self._lease.training_job
        model = ModelName.parse(job.spec.model)
        settings = self._settings
        checkpoint = await self._fetch_checkpoint()
        return Task(
            job=job.SerializeToString(),
            model_directory=str(settings.model_directories[model]),
            model_digest=self._digests[model],
            dataset=settings.dataset,
            certificates_file=str(settings.certificates_file or ""),
            delegation=self._attempt.delegation,
            folder=str(self._folder),
            checkpoint_folder=checkpoint,
            initial_folder="" if checkpoint else await self._fetch_initial_adapter(),
            device=self._device.kind,
            threads=settings.threads,
            tenant=self._lease.tenant,
            cache_bytes=settings.cache_bytes // settings.ranks,
            feature_folder=str(settings.data / "features"),
            feature_disk_bytes=settings.feature_disk_bytes // settings.ranks,
            dataset_patience_s=settings.dataset_patience_s,
        )

    async def _fetch_checkpoint(self) -> str:
        """Downloads what to resume from; empty where there is nothing."""
        if not self._lease.HasField("checkpoint"):
            return ""
        folder = self._folder / "resume"

        async def fetch(**how: object) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            announced = _pb.Checkpoint()
            request = _pb.GetCheckpointRequest(attempt=self._attempt.ref)
            async for piece in self._service.GetCheckpoint(request, **how):  # type: ignore[arg-type]  # as Attempt.call says
                if piece.HasField("checkpoint"):
                    announced = piece.checkpoint
                else:
                    await in_thread(folders.append, folder, piece.path, piece.data)
            await in_thread(folders.check, folder, list(announced.files))
            self._step = announced.step

        try:
            await self._attempt.call(fetch, timeout_s=None)
        except NotFound:  # none whose digests hold: from the beginning
            self._step = 0
            return ""
        return str(folder)

    async def _fetch_initial_adapter(self) -> str:
        """Downloads what a fresh run starts from; empty where it starts from nothing."""
        name = self._lease.training_job.spec.initial_adapter_version
        if not name:
            return ""
        folder = self._folder / "initial"
        await adapter_download.fetch(self._adapters, self._attempt, self._lease.tenant, name, folder)
        return str(folder)

    async def _listen(self, seat: Seat) -> OfJob | None:
        """Passes on what the child says of the job; returns the last word, None where it died without one."""
        while (message := await seat.heard.get()) is not None:
            match message:
                case Resolved():
                    self._attempt.resolve(training_job_pb2.ResolvedTraining.FromString(message.resolved))
                case Progressed():
                    progress = training_job_pb2.TrainingProgress.FromString(message.progress)
                    self._step, self._stepped = progress.step, True
                    self._attempt.progress(progress)
                case CheckpointMade():
                    self._store(message)
                case Shared():
                    self._attempt.shared(message.jobs)
                case _:
                    return message
        return None

    async def _obey(self, seat: Seat) -> None:
        """Has the child do what is ordered."""
        while True:
            await self._attempt.ordered.wait()
            self._attempt.ordered.clear()
            order = self._attempt.order
            # Without a step there is nothing to keep, and a child that is still loading would not listen.
            if order in (Order.CANCEL, Order.ABANDON) or not self._stepped:
                self._dropped = True
                await seat.leave()
            else:
                seat.stop()

    def _store(self, made: CheckpointMade) -> None:
        """Has a checkpoint stored after the one under way; of several that wait the newest is."""
        if self._made is not None:
            shutil.rmtree(self._made.folder, ignore_errors=True)
        self._made = made
        if self._storing is None or self._storing.done():
            self._storing = asyncio.create_task(self._store_made())

    async def _store_made(self) -> None:
        while self._made is not None:
            made, self._made = self._made, None
            folder = Path(made.folder)
            files = await in_thread(folders.described, folder)
            header = _pb.CheckpointHeader(attempt=self._attempt.ref, step=made.step, files=files)

            async def pieces() -> AsyncIterator[_pb.PutCheckpointRequest]:
                yield _pb.PutCheckpointRequest(header=header)  # noqa: B023  # consumed within the turn
                for piece in folders.pieces(folder, list(header.files)):  # noqa: B023
                    yield _pb.PutCheckpointRequest(file=piece)

            try:
                await self._attempt.heard()  # of its steps, which who goes on from it will not take again
                await self._attempt.call(lambda **how: self._service.PutCheckpoint(pieces(), **how), timeout_s=None)
            except Abandoned:
                return
            except VeneerError as error:  # the checkpoints before stay, and the next one is tried
                _log.error("checkpoint refused", step=made.step, reason=error.reason, problem=error.message)
            finally:
                await in_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _outcome(self, last: OfJob | None, status: int) -> Outcome | None:
        order = self._attempt.order
        if order is Order.ABANDON:
            raise Abandoned(self._attempt.ref.work)
        if order is Order.CANCEL:
            return {"cancelled": _pb.AttemptCancelled()}
        if isinstance(last, Failed):
            return {"failed": failure(last.reason, last.message, transient=last.transient)}
        if isinstance(last, Trained):
            return await self._publish(last)
        if isinstance(last, Stopped) or self._dropped:
            if self._storing is not None:
                await self._storing
            return self._given_back()
        return {"failed": failure("PROCESS_DIED", _death(status, self._step), transient=True)}

    def _given_back(self) -> Outcome:
        match self._attempt.order:  # it may have grown while the checkpoint was stored
            case Order.ABANDON:
                raise Abandoned(self._attempt.ref.work)
            case Order.CANCEL:
                return {"cancelled": _pb.AttemptCancelled()}
            case Order.PAUSE:
                return {"paused": _pb.AttemptPaused()}
            case _:
                return {"released": _pb.AttemptReleased()}

    async def _publish(self, trained: Trained) -> Outcome:
        folder = Path(trained.folder)
        files = await in_thread(folders.described, folder)
        header = _pb.PublishAdapterHeader(
            attempt=self._attempt.ref,
            digest=trained.digest,
            files=files,
            final_progress=training_job_pb2.TrainingProgress.FromString(trained.progress),
        )

        async def pieces() -> AsyncIterator[_pb.PublishAdapterVersionRequest]:
            yield _pb.PublishAdapterVersionRequest(header=header)
            for piece in folders.pieces(folder, files):
                yield _pb.PublishAdapterVersionRequest(file=piece)

        await self._attempt.heard()  # what was resolved belongs to the version's lineage
        try:
            version = await self._attempt.call(
                lambda **how: self._service.PublishAdapterVersion(pieces(), **how), timeout_s=None
            )
        except FailedPrecondition:
            # Its owner has asked for something in this moment; the next heartbeat says what.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ORDER_S):
                    await self._owner_wish()
            if self._attempt.order < Order.PAUSE:
                raise
            return self._given_back()
        _log.info("adapter published", work=self._attempt.ref.work, version=version.name, digest=version.digest)
        return {"succeeded": _pb.AttemptSucceeded()}

    async def _owner_wish(self) -> None:
        while self._attempt.order < Order.PAUSE:
            await self._attempt.ordered.wait()
            self._attempt.ordered.clear()


def _death(status: int, step: int) -> str:
    number = -status if status < 0 else status - 128  # where a rank died, as a shell says it
    try:
        name = signal.Signals(number).name
    except ValueError:  # 255 where what it was forked from has died with it
        return f"the training process ended with status {status} after step {step}"
    hint = ": it was killed, perhaps because memory ran out" if number == signal.SIGKILL else ""
    return f"the training process ended by {name} after step {step}{hint}"
