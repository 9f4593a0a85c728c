"""WorkerService at the edge: convert, call in a thread, convert back.

What is particular to a kind of work comes from outside: `fillers` write the work into a lease, and kinds
without one are not handed out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from veneer.trainer.v1 import adapter_pb2, export_pb2, worker_service_pb2, worker_service_pb2_grpc
from veneer_rpc.errors import NotFound, Violation, invalid
from veneer_rpc.threads import in_thread
from veneer_trainer.adapters.received_files import ReceivedFiles
from veneer_trainer.api.adapter_convert import version_to_proto
from veneer_trainer.api.changes import WAITING_WORK, Changes, changed
from veneer_trainer.api.evaluation_convert import metrics_from_proto, sample_from_proto, sample_to_proto
from veneer_trainer.api.export_convert import export_to_proto
from veneer_trainer.api.job_convert import (
    checkpoint_to_proto,
    duration,
    files_from_proto,
    progress_from_proto,
    seconds,
    state_to_proto,
)
from veneer_trainer.api.worker_convert import (
    beat_from_proto,
    ending_from_proto,
    kinds_from_proto,
    order_to_proto,
    worker_from_proto,
)
from veneer_trainer.domain.adapters import AdapterVersion
from veneer_trainer.domain.attempts import AttemptKey, Attempts, Ending, Order
from veneer_trainer.domain.dispatch import Dispatch
from veneer_trainer.domain.evaluating import Evaluations
from veneer_trainer.domain.exporting import ExportHeader, Exports
from veneer_trainer.domain.exports import Export
from veneer_trainer.domain.work import Work, WorkKind
from veneer_trainer.domain.workers import Worker, Workers
from veneer_trainer.failpoints import failpoint
from veneer_trainer.ports import (
    CheckpointStore,
    Delegations,
    FileReceiver,
    PublishHeader,
    StoredCheckpoint,
)

_T = TypeVar("_T")
_pb = worker_service_pb2
_Context = grpc.aio.ServicerContext[Any, Any]
_CHUNK_BYTES = 1 << 20
_MAX_WAIT_S = 60.0
_LOOK_S = 1.0  # a worker that waits is given a look so often, should a wake-up be missed

LeaseFiller = Callable[[Work, worker_service_pb2.Lease], None]


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """What a lease tells its worker, in seconds."""

    lease_s: float
    heartbeat_s: float
    stall_s: float
    delegation_s: float


class WorkerServicer(worker_service_pb2_grpc.WorkerServiceServicer):
    """The methods say what they do in the contract."""

    def __init__(
        self,
        dispatch: Dispatch,
        attempts: Attempts,
        workers: Workers,
        checkpoints: CheckpointStore,
        delegations: Delegations,
        changes: Changes,
        fillers: Mapping[WorkKind, LeaseFiller],
        evaluations: Evaluations,
        exports: Exports,
        times: LeaseTimes,
        incoming: Path,
        max_adapter_bytes: int,
        max_export_bytes: int,
    ) -> None:
        self._dispatch = dispatch
        self._attempts = attempts
        self._workers = workers
        self._checkpoints = checkpoints
        self._delegations = delegations
        self._changes = changes
        self._fillers = fillers
        self._evaluations = evaluations
        self._times = times
        self._incoming = incoming
        self._max_adapter_bytes = max_adapter_bytes
        self._exports = exports
        self._max_export_bytes = max_export_bytes

    async def AcquireLease(  # noqa: D102  # the contract says it
        self, request: _pb.AcquireLeaseRequest, context: _Context
    ) -> _pb.Lease:
        worker = worker_from_proto(request.worker)
        kinds = kinds_from_proto(request.kinds, self._fillers)
        beside = None
        if request.HasField("beside"):
            beside, _ = await in_thread(self._attempts.held_by, _key(request.beside))
        else:
            self._workers.announce(worker)
        over_s = time.monotonic() + min(seconds(request.wait), _MAX_WAIT_S)
        with self._changes.of(WAITING_WORK) as event:
            while True:
                event.clear()
                lease = await self._acquire(worker, kinds, beside)
                if lease is not None:
                    return lease
                left_s = over_s - time.monotonic()
                if left_s <= 0:
                    raise NotFound("NO_WORK", f"nothing waits that {worker.name} can do")
                await changed(event, min(left_s, _LOOK_S))

    async def _acquire(self, worker: Worker, kinds: set[WorkKind], beside: Work | None) -> _pb.Lease | None:
        """Leases work, and takes it back at once if the worker has gone meanwhile."""
        taking = asyncio.ensure_future(in_thread(self._take, worker, kinds, beside))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            lease = await taking
            if lease is not None:
                await in_thread(self._attempts.finish, _key(lease.attempt), Ending.RELEASED)
            raise

    def _take(self, worker: Worker, kinds: set[WorkKind], beside: Work | None) -> _pb.Lease | None:
        work = self._dispatch.acquire(worker, kinds, beside)
        if work is None:
            return None
        lease = _pb.Lease(
            attempt=_pb.AttemptRef(work=work.ref.name, fencing_token=work.token),
            lease_duration=duration(self._times.lease_s),
            heartbeat_interval=duration(self._times.heartbeat_s),
            stall_limit=duration(self._times.stall_s),
            delegation=self._delegations.for_worker(worker.name, work.ref.tenant),
            tenant=work.ref.tenant,
        )
        self._fillers[work.ref.kind](work, lease)
        checkpoint = self._checkpoints.newest(work.uid)
        if checkpoint is not None:
            lease.checkpoint.CopyFrom(checkpoint_to_proto(checkpoint))
        failpoint("lease.made")
        return lease

    async def Heartbeat(  # noqa: D102  # the contract says it
        self, requests: AsyncIterator[_pb.HeartbeatRequest], context: _Context
    ) -> AsyncIterator[_pb.HeartbeatResponse]:
        renewed_s = dict[AttemptKey, float]()
        async for request in requests:
            key = _key(request.attempt)
            order = await in_thread(self._attempts.beat, key, beat_from_proto(request))
            response = _pb.HeartbeatResponse(order=order_to_proto(order))
            # The first answer on a stream brings a delegation too: the worker may have been cut off for long.
            if order is not Order.ABANDON and time.monotonic() >= renewed_s.get(key, 0.0):
                renewed_s[key] = time.monotonic() + self._times.delegation_s / 2
                response.delegation = await in_thread(self._delegation, key)
            yield response

    def _delegation(self, key: AttemptKey) -> str:
        work, worker = self._attempts.held_by(key)
        return self._delegations.for_worker(worker, work.ref.tenant)

    async def PutCheckpoint(  # noqa: D102  # the contract says it
        self, requests: AsyncIterator[_pb.PutCheckpointRequest], context: _Context
    ) -> _pb.Checkpoint:
        header = await _header(requests)
        key, files = _key(header.attempt), files_from_proto(header.files)
        writer = await in_thread(self._attempts.begin_checkpoint, key, header.step, files)

        def store() -> StoredCheckpoint:
            return self._attempts.store_checkpoint(key, writer)

        return checkpoint_to_proto(await _received(requests, writer, store))

    async def GetCheckpoint(  # noqa: D102  # the contract says it
        self, request: _pb.GetCheckpointRequest, context: _Context
    ) -> AsyncIterator[_pb.GetCheckpointResponse]:
        checkpoint = await in_thread(self._attempts.checkpoint, _key(request.attempt))
        if checkpoint is None:
            raise NotFound("NO_CHECKPOINT", f"{request.attempt.work[:80]} has no checkpoint")
        yield _pb.GetCheckpointResponse(checkpoint=checkpoint_to_proto(checkpoint))
        for path, offset in _chunks(checkpoint):
            data = await in_thread(_read, checkpoint.folder / path, offset)
            yield _pb.GetCheckpointResponse(path=path, offset_bytes=offset, data=data)

    async def PublishAdapterVersion(  # noqa: D102  # the contract says it
        self, requests: AsyncIterator[_pb.PublishAdapterVersionRequest], context: _Context
    ) -> adapter_pb2.AdapterVersion:
        header = await _header(requests)
        key, files = _key(header.attempt), files_from_proto(header.files)
        await in_thread(self._attempts.begin_publishing, key)
        received = await in_thread(ReceivedFiles, self._incoming, files, self._max_adapter_bytes)

        def publish() -> AdapterVersion:
            _, worker = self._attempts.held_by(key)
            progress = progress_from_proto(header.final_progress)
            announced = PublishHeader(header.digest, files, progress, self._workers.code_version(worker))
            return self._attempts.publish(key, announced, received.check())

        return version_to_proto(await _received(requests, received, publish))

    async def PutSamples(  # noqa: D102  # the contract says it
        self, request: _pb.PutSamplesRequest, context: _Context
    ) -> _pb.PutSamplesResponse:
        key, samples = _key(request.attempt), tuple(map(sample_from_proto, request.samples))
        metrics = metrics_from_proto(request.metrics) or None
        act = self._evaluations.put_samples
        stored = await in_thread(act, key.work, key.token, samples, metrics, request.total_samples)
        return _pb.PutSamplesResponse(stored_samples=stored)

    async def GetSamples(  # noqa: D102  # the contract says it
        self, request: _pb.GetSamplesRequest, context: _Context
    ) -> _pb.GetSamplesResponse:
        key = _key(request.attempt)
        found = await in_thread(self._evaluations.stored_samples, key.work, key.token, request.start_index)
        return _pb.GetSamplesResponse(samples=map(sample_to_proto, found))

    async def PublishExport(  # noqa: D102  # the contract says it
        self, requests: AsyncIterator[_pb.PublishExportRequest], context: _Context
    ) -> export_pb2.Export:
        header = await _header(requests)
        key, files = _key(header.attempt), files_from_proto(header.files)
        await in_thread(self._attempts.begin_publishing, key)
        received = await in_thread(ReceivedFiles, self._incoming, files, self._max_export_bytes)

        def publish() -> Export:
            _, worker = self._attempts.held_by(key)
            announced = ExportHeader(header.digest, files, header.statement, self._workers.code_version(worker))
            return self._exports.publish(key, announced, received.check())

        return export_to_proto(await _received(requests, received, publish))

    async def FinishAttempt(  # noqa: D102  # the contract says it
        self, request: _pb.FinishAttemptRequest, context: _Context
    ) -> _pb.FinishAttemptResponse:
        ending, failure = ending_from_proto(request)
        state = await in_thread(self._attempts.finish, _key(request.attempt), ending, failure)
        return _pb.FinishAttemptResponse(state=state_to_proto(state))


def _key(message: _pb.AttemptRef) -> AttemptKey:
    return AttemptKey(message.work, message.fencing_token)


async def _header(requests: AsyncIterator[Any]) -> Any:  # noqa: ANN401  # of one of two streams
    """Returns what the first message announces."""
    first = await anext(aiter(requests), None)
    if first is None or first.WhichOneof("piece") != "header":
        raise invalid(Violation("piece", "HEADER_MISSING", "the first message must be the header"))
    return first.header


async def _received(requests: AsyncIterator[Any], receiver: FileReceiver, store: Callable[[], _T]) -> _T:
    """Takes the files that follow a header, then stores them; what is not stored is removed."""
    try:
        async for request in requests:
            if request.WhichOneof("piece") != "file":
                raise invalid(Violation("piece", "HEADER_TWICE", "only files may follow the header"))
            await in_thread(receiver.write, request.file.path, request.file.data)
        return await in_thread(store)
    finally:
        await in_thread(receiver.abandon)


def _chunks(checkpoint: StoredCheckpoint) -> Iterator[tuple[str, int]]:
    """The (path, offset) of every message; an empty file has one too."""
    for file in checkpoint.files:
        for offset in range(0, max(file.size_bytes, 1), _CHUNK_BYTES):
            yield file.path, offset


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_CHUNK_BYTES)
