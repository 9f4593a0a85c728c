"""What a worker does with the work it holds: heartbeats, checkpoints, publishing, the end.

Every act names its attempt by work and fencing token, and the store compares them where the act lands.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import msgspec

from veneer_rpc.errors import Aborted, FailedPrecondition
from veneer_trainer.domain.adapters import AdapterVersion
from veneer_trainer.domain.curves import points_of
from veneer_trainer.domain.dispatch import Dispatch
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Progress, Resolved, as_json, job_of
from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.retries import RetryPolicy, after_release
from veneer_trainer.domain.work import Changes, Failure, Work, WorkKind
from veneer_trainer.failpoints import failpoint
from veneer_trainer.ports import (
    CheckpointStore,
    CheckpointWriter,
    Curves,
    EvaluationPlanner,
    History,
    PublishHeader,
    Registry,
    StoredCheckpoint,
    WorkStore,
)

_SHARES = 1_000_000  # steps that a share of work done is counted in
_TRIES = 10  # against an owner who asks for something in the same moment


class Order(Enum):
    """What a worker must do, as the answer to a heartbeat says."""

    CONTINUE = "continue"
    CANCEL = "cancel"
    PAUSE = "pause"
    ABANDON = "abandon"


class Ending(Enum):
    """How a worker says that its attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class AttemptKey:
    """An attempt as its worker names it: the work's resource name, and the fencing token."""

    work: str
    token: int


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life; None where nothing is new.

    Attributes:
        progress: the latest figures of training.
        share_done: of an evaluation or export, 0-1.
        resolved: what the attempt decided for the job.
        earlier: figures since the last sign, before `progress`, oldest first.
        co_trained_jobs: jobs that have shared passes with this one.
    """

    progress: Progress | None = None
    share_done: float = 0.0
    resolved: Resolved | None = None
    earlier: tuple[Progress, ...] = ()
    co_trained_jobs: tuple[str, ...] = ()


class Attempts:
    """The workers' side of queued work.

    Raises:
        Aborted: each method, but `beat`: STALE_TOKEN.
    """

    def __init__(
        self,
        store: WorkStore,
        dispatch: Dispatch,
        retries: RetryPolicy,
        checkpoints: CheckpointStore,
        curves: Curves,
        registry: Registry,
        planner: EvaluationPlanner,
        history: History,
    ) -> None:
        self._store = store
        self._dispatch = dispatch
        self._retries = retries
        self._checkpoints = checkpoints
        self._curves = curves
        self._registry = registry
        self._planner = planner
        self._history = history

    def held(self, key: AttemptKey) -> Work:
        """Returns the work that an attempt holds."""
        return self._store.fenced(key.work, key.token)

    def held_by(self, key: AttemptKey) -> tuple[Work, str]:
        """Returns the work that an attempt holds, and the name of its worker."""
        work = self.held(key)
        return work, self._store.attempts(work.uid, 1)[0].worker

    def beat(self, key: AttemptKey, beat: Beat) -> Order:
        """Renews the lease, keeps the figures, and returns what the worker must do."""
        try:
            before = self.held(key)
            work = self._store.beat(key.work, key.token, **_news(before, beat))
            if work.state is State.LEASED and (beat.progress or beat.share_done > 0):
                work = self._store.move(work, State.RUNNING)
        except Aborted as error:
            return Order.ABANDON if error.reason == "STALE_TOKEN" else Order.CONTINUE
        if beat.progress is not None:
            self._curves.append(work.ref, points_of((*beat.earlier, beat.progress), job_of(before).progress))
        return {State.CANCELLING: Order.CANCEL, State.PAUSING: Order.PAUSE}.get(work.state, Order.CONTINUE)

    def begin_checkpoint(self, key: AttemptKey, step: int, files: Collection[StoredFile]) -> CheckpointWriter:
        """Opens a checkpoint; raises ResourceExhausted where there is no room."""
        return self._checkpoints.begin(self.held(key).uid, key.token, step, files)

    def store_checkpoint(self, key: AttemptKey, writer: CheckpointWriter) -> StoredCheckpoint:
        """Makes a received checkpoint the newest; raises DataLoss when its files are not what was announced."""
        checkpoint = writer.finish(lambda step: self._store.checkpointing(key.work, key.token, step))
        self._history.record("checkpoint", token=key.token, step=checkpoint.step)
        return checkpoint

    def checkpoint(self, key: AttemptKey) -> StoredCheckpoint | None:
        """Returns the newest checkpoint whose digests hold."""
        return self._checkpoints.newest_good(self.held(key).uid)

    def begin_publishing(self, key: AttemptKey) -> Work:
        """Moves a job to PUBLISHING; raises FailedPrecondition if it is being cancelled."""
        return self._advance(self.held(key))

    def publish(self, key: AttemptKey, header: PublishHeader, folder: Path) -> AdapterVersion:
        """Makes a received adapter the job's one version; see `ports.Registry` for what it raises."""
        work = self.held(key)
        version = self._registry.publish(
            work.ref.tenant, job_of(work), header, folder, lambda: self._store.fenced(key.work, key.token)
        )
        failpoint("publish.recorded")
        published = replace(job_of(work).outcome, adapter_version=str(version.name), adapter_digest=version.digest)
        self._store.change(self.held(key), outcome=as_json(published))
        self._history.record("published", work=work.uid, token=key.token, version=str(version.name))
        return version

    def finish(self, key: AttemptKey, ending: Ending, failure: Failure | None = None) -> State:
        """Ends the attempt and returns where the work stands then.

        Raises:
            FailedPrecondition: NOT_PUBLISHED: a job cannot succeed before its adapter is published, an export not
                before its files are;
                INCOMPLETE: an evaluation not before its samples are there; WRONG_STATE: no pause or cancel was
                asked for.
        """
        for _ in range(_TRIES):
            work = self.held(key)
            try:
                with self._store.together():
                    then, changes = self._ending(work, ending, failure)
                    if ending is Ending.SUCCEEDED:
                        work = self._advance(work)
                    ended = self._dispatch.end(work, then, changes)
            except Aborted as error:
                if error.reason != "STATE_CHANGED":
                    raise
                continue
            self._dispatch.settle(ended)
            if ending is Ending.SUCCEEDED and ended.ref.kind is WorkKind.TRAINING:
                self._planner.settle(ended.ref.tenant, job_of(ended).outcome.evaluations)
            if then in (State.SUCCEEDED, State.CANCELLED):
                self._checkpoints.forget(work.uid)
            return then
        raise Aborted("STATE_CHANGED", f"{key.work[:80]} keeps changing; try again")

    def _ending(self, work: Work, ending: Ending, failure: Failure | None) -> tuple[State, Changes]:
        match ending:
            case Ending.FAILED if failure is not None:
                return self._retries.after(work, failure)
            case Ending.CANCELLED:
                return State.CANCELLED, {}
            case Ending.PAUSED:
                return State.PAUSED, {}
            case Ending.RELEASED:
                return after_release(work), {}
        if work.ref.kind is WorkKind.EVALUATION:
            self._planner.check_complete(work)
            return State.SUCCEEDED, {}
        if work.ref.kind is WorkKind.EXPORT:
            if not work.outcome:
                raise FailedPrecondition("NOT_PUBLISHED", f"{work.ref.name} has no files", resource=work.ref.name)
            return State.SUCCEEDED, {}
        job = job_of(work)
        if not job.outcome.adapter_version:
            raise FailedPrecondition(
                "NOT_PUBLISHED", f"{work.ref.name} has published no adapter version", resource=work.ref.name
            )
        evaluations = self._planner.plan(work.ref.tenant, job)
        return State.SUCCEEDED, {"outcome": as_json(replace(job.outcome, evaluations=evaluations))}

    def _advance(self, work: Work) -> Work:
        """Moves work on to PUBLISHING, whatever of the way it has gone."""
        with self._store.together():
            if work.state is State.LEASED:
                work = self._store.move(work, State.RUNNING)
            return work if work.state is State.PUBLISHING else self._store.move(work, State.PUBLISHING)


def _news(work: Work, beat: Beat) -> Changes:
    changes: Changes = {}
    if beat.progress is not None:
        changes["progress"], changes["step"] = as_json(beat.progress), beat.progress.step
    elif beat.share_done > 0:
        changes["progress"] = msgspec.json.encode({"share_done": beat.share_done}).decode()
        changes["step"] = round(beat.share_done * _SHARES)
    if beat.resolved is not None or beat.co_trained_jobs:
        outcome = job_of(work).outcome
        resolved = outcome.resolved or beat.resolved
        if resolved is not None:
            together = tuple(sorted({*resolved.co_trained_jobs, *beat.co_trained_jobs}))
            resolved = replace(resolved, co_trained_jobs=together)
        if resolved != outcome.resolved:
            changes["outcome"] = as_json(replace(outcome, resolved=resolved))
    return changes
