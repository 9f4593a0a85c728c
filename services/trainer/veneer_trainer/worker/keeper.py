"""The worker's main loop: take a lease, do its work, end it, until told to go.

One piece of work at a time, but for training jobs that may share their passes over the base: those are done together.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog

from veneer.trainer.v1 import (
    adapter_service_pb2_grpc,
    model_pb2,
    training_job_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from veneer_rpc.errors import NotFound, VeneerError
from veneer_rpc.names import ModelName
from veneer_rpc.status import from_rpc_error
from veneer_rpc.threads import in_thread
from veneer_trainer.worker import child_process
from veneer_trainer.worker.attempt import Abandoned, Attempt, Order, failure
from veneer_trainer.worker.calibrations import Calibrations
from veneer_trainer.worker.connections import bearer, open_channel
from veneer_trainer.worker.crew import Crew
from veneer_trainer.worker.device import Device
from veneer_trainer.worker.evaluation import EvaluationWork
from veneer_trainer.worker.export import ExportWork
from veneer_trainer.worker.machine import code_version
from veneer_trainer.worker.monitoring import Monitoring
from veneer_trainer.worker.settings import WorkerSettings
from veneer_trainer.worker.training import TrainingWork

_pb = worker_service_pb2
_log = structlog.get_logger(__name__)
_WAIT_S = 30.0  # for work, in one call
_AGAIN_S, _LONGEST_AGAIN_S = 0.2, 2.0
_BEATS_S = 5.0  # for the last heartbeat to end


class Keeper:
    """Keeps leases and does the work under them.

    Args:
        settings: the process's.
        digests: of the bases that it holds.
        device: to train on.
    """

    def __init__(self, settings: WorkerSettings, digests: Mapping[ModelName, str], device: Device) -> None:
        self._settings = settings
        self._digests = digests
        self._device = device
        self._token = settings.token_file.read_text("utf-8").strip()
        self._draining = asyncio.Event()
        self._attempts: list[Attempt] = []
        self._again_s = _AGAIN_S
        self._running: asyncio.Future[None] | None = None
        self._scratch = settings.data / "attempts"
        self._calibrations = Calibrations(settings, digests, device, code_version())
        self.monitoring = Monitoring(lambda: self._attempts[-1].latest if self._attempts else None)

    def drain(self) -> None:
        """Has the worker give its work back, with a checkpoint, and end."""
        if self._draining.is_set():
            return
        self._draining.set()
        for attempt in self._attempts:
            attempt.give(Order.RELEASE)
        if self._running is not None:
            # A trainer that is away, or a step without end, must not hold the process.
            asyncio.get_running_loop().call_later(self._settings.grace_s, self._running.cancel)

    async def run(self) -> None:
        """Works until it is drained, or its grace is over then."""
        self._running = asyncio.ensure_future(self._work())
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    async def _work(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)  # of an earlier process of this name
        self._scratch.mkdir(parents=True)
        if {_pb.WORK_KIND_TRAINING, _pb.WORK_KIND_EXPORT} & set(self._settings.work_kinds):
            child_process.get_ready(self._settings.threads)
        channel = open_channel(self._settings.trainer, self._settings.certificates_file)
        service = worker_service_pb2_grpc.WorkerServiceStub(channel)
        self._adapters = adapter_service_pb2_grpc.AdapterServiceStub(channel)
        print(f"veneer_worker {self._settings.name} ready", flush=True)
        try:
            while (lease := await self._lease(service)) is not None:
                await self._do_and_what_joins(service, lease)
        finally:
            await channel.close()

    async def _lease(self, service: worker_service_pb2_grpc.WorkerServiceAsyncStub) -> _pb.Lease | None:
        """Waits for work, and measures meanwhile; None when the worker is to end."""
        going = asyncio.ensure_future(self._draining.wait())
        measuring = asyncio.ensure_future(self._measure())
        try:
            while not self._draining.is_set():
                if (lease := await self._ask(service, [], [going, measuring])) is not None:
                    return lease
                if measuring.done() and not self._draining.is_set():  # the next request says what was measured
                    measuring.result()
                    measuring = asyncio.ensure_future(self._measure())
            return None
        finally:
            going.cancel()
            measuring.cancel()
            await asyncio.wait([measuring])  # its child has ended: the machine is the work's

    async def _ask(
        self,
        service: worker_service_pb2_grpc.WorkerServiceAsyncStub,
        beside: Sequence[_pb.Lease],
        until: Collection[asyncio.Future[Any]],
    ) -> _pb.Lease | None:
        """Asks once for work that joins what is done already; None when there is none, or one of `until` came first."""
        request = self._request(beside)
        call = service.AcquireLease(request, metadata=bearer(self._token), timeout=_WAIT_S + 10)
        asked = asyncio.ensure_future(_answer(call))
        try:
            await asyncio.wait([asked, *until], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not asked.done():
                call.cancel()  # the trainer takes the lease back
        await asyncio.wait([asked])
        if asked.cancelled():
            return None
        try:
            lease = asked.result()
            self._again_s = _AGAIN_S
            return lease
        except grpc.RpcError as error:
            problem = from_rpc_error(error)
            if isinstance(problem, NotFound):
                self._again_s = _AGAIN_S
                return None
            _log.warning("no lease", reason=problem.reason, problem=problem.message)
        await asyncio.wait(until, timeout=self._again_s, return_when=asyncio.FIRST_COMPLETED)
        self._again_s = min(2 * self._again_s, _LONGEST_AGAIN_S)
        return None

    def _request(self, beside: Sequence[_pb.Lease]) -> _pb.AcquireLeaseRequest:
        settings, device = self._settings, self._device
        info = _pb.WorkerInfo(
            worker=settings.name,
            device=device.kind,
            worker_class=device.worker_class,
            dtypes=[model_pb2.DTYPE_FLOAT32, model_pb2.DTYPE_BFLOAT16],
            memory_bytes=min(device.memory_bytes, settings.memory_bytes // settings.ranks or sys.maxsize),
            models=[_pb.HeldModel(model=str(name), digest=digest) for name, digest in sorted(self._digests.items())],
            code_version=code_version(),
            calibrations=self._calibrations.known,
            ranks=settings.ranks,
        )
        request = _pb.AcquireLeaseRequest(worker=info, kinds=settings.work_kinds)
        if beside:
            request.beside.CopyFrom(beside[0].attempt)
            # Each is counted with a base of its own: they take less.
            taken_bytes = sum(lease.training_job.estimate.peak_memory_bytes for lease in beside)
            request.worker.memory_bytes = max(info.memory_bytes - taken_bytes, 1)
        request.wait.FromMilliseconds(round(_WAIT_S * 1000))
        return request

    async def _measure(self) -> None:
        """Measures a shape of job once the worker has been idle for a while; waits where all are known."""
        await asyncio.sleep(self._settings.calibrate_idle_s)
        if self._calibrations.missing and _pb.WORK_KIND_TRAINING in self._settings.work_kinds:
            try:
                return await self._calibrations.measure_next()
            except OSError as error:  # no process, or no room on the disk: estimates stay as they are
                _log.warning("shape not measured", problem=str(error))
        await asyncio.Event().wait()

    async def _do_and_what_joins(
        self, service: worker_service_pb2_grpc.WorkerServiceAsyncStub, lease: _pb.Lease
    ) -> None:
        """Does the work, and beside a job that may share its passes those that come to share them."""
        crew = Crew(self._settings.log_level, self._settings.ranks)
        doing = {asyncio.create_task(self._do(service, lease, crew)): lease}
        going = asyncio.ensure_future(self._draining.wait())
        shares = lease.training_job.spec.co_train == training_job_pb2.CO_TRAIN_ALLOWED and self._settings.ranks == 1
        try:
            while doing:
                if shares and len(doing) < self._settings.co_train_jobs and not going.done():
                    leases = list(doing.values())
                    if (joins := await self._ask(service, leases, [going, *doing])) is not None:
                        doing[asyncio.create_task(self._do(service, joins, crew))] = joins
                else:
                    await asyncio.wait(doing, return_when=asyncio.FIRST_COMPLETED)
                for done in [task for task in doing if task.done()]:
                    doing.pop(done)
                    done.result()
        finally:
            going.cancel()
            for task in doing:
                task.cancel()
            if doing:
                await asyncio.wait(doing)

    async def _do(self, service: worker_service_pb2_grpc.WorkerServiceAsyncStub, lease: _pb.Lease, crew: Crew) -> None:
        with self.monitoring.attempt(_kind(lease)):
            await self._attend(service, lease, crew)

    async def _attend(
        self, service: worker_service_pb2_grpc.WorkerServiceAsyncStub, lease: _pb.Lease, crew: Crew
    ) -> None:
        attempt = Attempt(service, self._token, lease)
        self._attempts.append(attempt)
        folder = self._scratch / f"{lease.attempt.work.replace('/', '-')}-{lease.attempt.fencing_token}"
        folder.mkdir()
        if self._draining.is_set():
            attempt.give(Order.RELEASE)
        _log.info("attempt begins", work=lease.attempt.work, token=lease.attempt.fencing_token)
        beats = asyncio.create_task(attempt.keep_alive())
        try:
            outcome = await self._outcome(service, attempt, lease, folder, crew)
            if outcome is not None:
                await attempt.finish(**outcome)
                self.monitoring.ended(_kind(lease), next(iter(outcome)))
        except Abandoned:
            self.monitoring.ended(_kind(lease), "abandoned")
            _log.warning("attempt abandoned", work=lease.attempt.work)
        except VeneerError as error:
            self.monitoring.ended(_kind(lease), "refused")
            _log.error("attempt not finished", work=lease.attempt.work, reason=error.reason, problem=error.message)
        finally:
            self._attempts.remove(attempt)
            beats.cancel()
            await asyncio.wait([beats], timeout=_BEATS_S)
            await in_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _outcome(
        self,
        service: worker_service_pb2_grpc.WorkerServiceAsyncStub,
        attempt: Attempt,
        lease: _pb.Lease,
        folder: Path,
        crew: Crew,
    ) -> dict[str, object] | None:
        """Does the work; returns the outcome to tell, None where there is nobody to tell."""
        try:
            match kind := lease.WhichOneof("work"):
                case "training_job":
                    self._calibrations.want(lease.training_job.spec)
                    training = TrainingWork(
                        self._settings, self._digests, self._device,
                        service, self._adapters, attempt, lease, folder, crew,
                    )  # fmt: skip
                    return await training.run()
                case "evaluation":
                    return await EvaluationWork(self._settings, service, attempt, lease).run()
                case "export":
                    exporting = ExportWork(
                        self._settings, self._digests, service, self._adapters, attempt, lease, folder
                    )
                    return await exporting.run()
                case _:
                    text = f"this worker does not do {kind}"
                    return {"failed": failure("WORK_UNKNOWN", text, transient=True)}
        except Abandoned:
            raise
        except VeneerError as error:
            return {"failed": failure(error.reason, error.message, transient=False)}
        except Exception as error:
            _log.exception("attempt failed", work=lease.attempt.work)
            text = f"{type(error).__name__}: {error}"
            return {"failed": failure("WORKER_ERROR", text, transient=False)}


def _kind(lease: _pb.Lease) -> str:
    return (lease.WhichOneof("work") or "unknown").removesuffix("_job")


async def _answer(call: grpc.aio.UnaryUnaryCall[_pb.AcquireLeaseRequest, _pb.Lease]) -> _pb.Lease:
    return await call
