"""One attempt, as its worker keeps it: heartbeats, orders, and calls that are made until they are answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import TypeVar

import grpc
import structlog

from veneer.trainer.v1 import training_job_pb2, worker_service_pb2, worker_service_pb2_grpc
from veneer_rpc import errors
from veneer_rpc.status import from_rpc_error
from veneer_trainer.worker.connections import bearer

_T = TypeVar("_T")
_pb = worker_service_pb2
_log = structlog.get_logger(__name__)
_BEAT_S = 1.0  # at most between two heartbeats: figures are fresh, and an order is obeyed soon
_AGAIN_S, _LONGEST_AGAIN_S = 0.2, 5.0
_CALL_S = 60.0
_HEARD_S = 0.02
_MOST_FIGURES = 100  # in one heartbeat
# What may pass: the service is away, full or restarting, or a credential is being replaced.
_PASSING = (
    errors.Unavailable,
    errors.DeadlineExceeded,
    errors.ResourceExhausted,
    errors.Cancelled,
    errors.Internal,
    errors.Unauthenticated,
    errors.Aborted,
)
_MISSING = {"NO_CHECKPOINT", "VERSION_UNKNOWN"}  # what is not there is something that the work needs, not the work


class Order(IntEnum):
    """What is to become of the attempt; a greater one takes the place of a lesser."""

    CONTINUE = 0
    RELEASE = 1  # the worker itself goes away
    PAUSE = 2
    CANCEL = 3
    ABANDON = 4


_ORDERS = {
    _pb.WORKER_ORDER_PAUSE: Order.PAUSE,
    _pb.WORKER_ORDER_CANCEL: Order.CANCEL,
    _pb.WORKER_ORDER_ABANDON: Order.ABANDON,
}


class Abandoned(Exception):
    """The attempt is no longer this worker's: nothing more is to be sent for it."""


class Attempt:
    """The lease of one piece of work.

    Attributes:
        ref: names the attempt.
        delegation: the newest credential for the dataset and inference services.
        order: what is to become of it.
        latest: the newest figures of training; None before the first.
        ordered: set when `order` has changed; who reads it clears it.
        on_delegation: called with each renewed credential.
    """

    def __init__(self, service: worker_service_pb2_grpc.WorkerServiceAsyncStub, token: str, lease: _pb.Lease) -> None:
        self.ref = lease.attempt
        self.delegation = lease.delegation
        self.order = Order.CONTINUE
        self.latest: training_job_pb2.TrainingProgress | None = None
        self.ordered = asyncio.Event()
        self.on_delegation: Callable[[str], None] = lambda delegation: None
        self._service = service
        self._metadata = bearer(token)
        interval_s = lease.heartbeat_interval.ToNanoseconds() / 1e9
        self._beat_s = min(interval_s / 2, _BEAT_S)
        self._answer_s = max(lease.lease_duration.ToNanoseconds() / 1e9, interval_s)
        self._resolved: training_job_pb2.ResolvedTraining | None = None
        self._progress: list[training_job_pb2.TrainingProgress] = []  # not told yet, oldest first
        self._shared: list[str] = []  # in every heartbeat: it counts for nothing before the decision is told
        self._share_done = self._told_share = 0.0
        self._hurry = asyncio.Event()

    @property
    def abandoned(self) -> bool:
        """Whether the attempt is no longer ours."""
        return self.order is Order.ABANDON

    def resolve(self, resolved: training_job_pb2.ResolvedTraining) -> None:
        """Has the next heartbeat say what was decided for the job."""
        self._resolved = resolved

    def shared(self, jobs: list[str]) -> None:
        """Has heartbeats say which jobs have shared passes with this one."""
        self._shared = jobs

    def progress(self, progress: training_job_pb2.TrainingProgress) -> None:
        """Has the next heartbeat carry figures of training; of those that wait the newest hundred."""
        self.latest = progress
        self._progress = [*self._progress[1 - _MOST_FIGURES :], progress]

    def share_done(self, share: float) -> None:
        """Has heartbeats say how much of an evaluation is done, 0-1."""
        self._share_done = share

    async def heard(self) -> None:
        """Waits until the trainer has heard what there is to tell now.

        Raises:
            Abandoned: the attempt is not ours any more.
        """
        newest = self._progress[-1] if self._progress else None
        self._hurry.set()
        while (
            self._resolved is not None
            or self._told_share != self._share_done
            or any(each is newest for each in self._progress)
        ):
            if self.abandoned:
                raise Abandoned(self.ref.work)
            await asyncio.sleep(_HEARD_S)

    def give(self, order: Order) -> None:
        """Orders what is to become of the attempt."""
        if order > self.order:
            self.order = order
            self.ordered.set()

    async def keep_alive(self) -> None:
        """Sends heartbeats until it is cancelled, or the attempt is no longer ours.

        While the trainer is away the work goes on: only the trainer knows whether the lease is lost.
        """
        while not self.abandoned:
            call = self._service.Heartbeat(metadata=self._metadata)
            try:
                while not self.abandoned:
                    async with asyncio.timeout(self._answer_s):
                        await self._beat(call)
                    await self._pause()
            except grpc.RpcError as error:
                problem = from_rpc_error(error)
                if _lost(problem):
                    self.give(Order.ABANDON)
                _log.warning("heartbeat failed", work=self.ref.work, reason=problem.reason, problem=problem.message)
            except (TimeoutError, asyncio.InvalidStateError):
                _log.warning("heartbeat unanswered", work=self.ref.work)
            finally:
                call.cancel()
            await asyncio.sleep(_AGAIN_S)

    async def _pause(self) -> None:
        """Waits until the next heartbeat is due, or somebody waits for it."""
        self._hurry.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._beat_s):
                await self._hurry.wait()

    async def _beat(self, call: grpc.aio.StreamStreamCall[_pb.HeartbeatRequest, _pb.HeartbeatResponse]) -> None:
        progress, resolved, share_done = self._progress, self._resolved, self._share_done
        request = _pb.HeartbeatRequest(attempt=self.ref, share_done=share_done, co_trained_jobs=self._shared)
        # A decision is told before the first step is: they never cross.
        if resolved is not None:
            request.resolved.CopyFrom(resolved)
        if progress:
            request.training.CopyFrom(progress[-1])
            request.earlier.extend(progress[:-1])
        await call.write(request)
        response = await call.read()
        if not isinstance(response, _pb.HeartbeatResponse):  # the stream's end
            raise TimeoutError
        self._told_share = share_done
        told = set(map(id, progress))
        self._progress = [each for each in self._progress if id(each) not in told]
        if self._resolved is resolved:
            self._resolved = None
        if response.delegation:
            self.delegation = response.delegation
            self.on_delegation(response.delegation)
        self.give(_ORDERS.get(response.order, Order.CONTINUE))

    async def call(self, ask: Callable[..., Awaitable[_T]], *, timeout_s: float | None = _CALL_S) -> _T:
        """Makes a call, again and again while what stands against it may pass.

        Args:
            ask: makes the call anew, under the keywords `metadata` and `timeout`.
            timeout_s: of each; None leaves it to the connection's keepalive.

        Raises:
            Abandoned: the attempt is not ours any more.
            VeneerError: the call was refused.
        """
        wait_s = _AGAIN_S
        while True:
            try:
                return await ask(metadata=self._metadata, timeout=timeout_s)
            except grpc.RpcError as error:
                problem = from_rpc_error(error)
                if _lost(problem):
                    self.give(Order.ABANDON)
                    raise Abandoned(self.ref.work) from error
                if not _passes(problem):
                    raise problem from error
                _log.warning("call postponed", work=self.ref.work, reason=problem.reason, problem=problem.message)
            if self.abandoned:
                raise Abandoned(self.ref.work)
            await asyncio.sleep(min(problem.retry_after_s or wait_s, _LONGEST_AGAIN_S))
            wait_s = min(2 * wait_s, _LONGEST_AGAIN_S)

    async def finish(self, **outcome: object) -> None:
        """Ends the attempt; `outcome` is a field of FinishAttemptRequest. Raises as `call`."""
        request = _pb.FinishAttemptRequest(attempt=self.ref, **outcome)  # type: ignore[arg-type]  # one of its fields
        response = await self.call(lambda **how: self._service.FinishAttempt(request, **how))
        state = training_job_pb2.JobState.Name(response.state)
        _log.info("attempt finished", work=self.ref.work, outcome=next(iter(outcome)), state=state)


def failure(reason: str, message: str, *, transient: bool) -> training_job_pb2.Failure:
    """Returns why something did not succeed, within the contract's bounds."""
    text = message.encode()[:512].decode(errors="ignore")
    return training_job_pb2.Failure(reason=reason, message=text, transient=transient)


def _passes(problem: errors.VeneerError) -> bool:
    """Says whether the same call may succeed later; what is over a bound does only where a time is named."""
    full = isinstance(problem, errors.ResourceExhausted) and problem.retry_after_s is None
    return isinstance(problem, _PASSING) and not full


def _lost(problem: errors.VeneerError) -> bool:
    """Says whether an answer means that the work is another's or gone."""
    if isinstance(problem, errors.Aborted):
        return problem.reason == "STALE_TOKEN"
    return isinstance(problem, errors.NotFound) and problem.reason not in _MISSING
