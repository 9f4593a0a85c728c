"""Queued work: what training jobs, evaluations and exports have in common.

Each is an order of a tenant that waits, is leased to a worker, lives by heartbeats and ends once
(`lifecycle`). What is in the order, and what came of it, is JSON that only the kind's own module reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypedDict

from veneer_rpc.errors import Aborted
from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.spec import Priority


class WorkKind(Enum):
    """What a worker is asked to do; the value is the collection in the work's name."""

    TRAINING = "trainingJobs"
    EVALUATION = "evaluations"
    EXPORT = "exports"


@dataclass(frozen=True, slots=True)
class WorkRef:
    """Which work: ids are unique within a tenant's collection."""

    tenant: str
    kind: WorkKind
    id: str

    @property
    def name(self) -> str:
        """The resource's name, such as `trainingJobs/a`."""
        return f"{self.kind.value}/{self.id}"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a worker must have to do the work; empty and 0 ask for nothing.

    `shares` is alike for works that may share a worker's passes over the base; empty for one that trains alone.
    """

    model_digest: str = ""
    dtype: str = ""
    memory_bytes: int = 0
    shares: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something did not succeed: an UPPER_SNAKE reason, a sentence, and whether trying again may help."""

    reason: str
    message: str
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Attempt:
    """One lease of the work by one worker; times in seconds since 1970."""

    number: int
    token: int
    worker: str
    started_s: float
    ended_s: float | None
    resumed_step: int
    last_step: int
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class NewWork:
    """Work to accept.

    `subject` is what lists filter by (a job's adapter, an evaluation's subject); `dataset_version` is held at
    the dataset service while the work is unfinished; `order` is the kind's JSON and never changes.
    """

    ref: WorkRef
    uid: str
    order: str
    subject: str = ""
    priority: Priority = Priority.NORMAL
    needs: Needs = Needs()
    dataset_version: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """Accepted work, as the database has it. Times are seconds since 1970, None while they have not come.

    Attributes:
        token: fencing token of the newest attempt; 0 before the first. Tokens are unique over all work.
        beats: heartbeats of all attempts: it grows while the worker lives.
        step: of the newest attempt, in the kind's own unit: it grows while the work goes on.
        deaths: attempts that died since one of them stored a checkpoint.
        retries: transient failures that were queued again.
        delay_s: what a queued retry still waits before it may be leased; 0 for all else.
        outcome: the kind's JSON of what came of it; empty at first.
        progress: the kind's JSON of the latest figures; empty before the first.
        held_dataset: True while a hold at the dataset service may exist.
        revision: grows with every change.
    """

    ref: WorkRef
    uid: str
    order: str
    subject: str
    priority: Priority
    needs: Needs
    dataset_version: str
    state: State
    token: int
    beats: int
    step: int
    deaths: int
    retries: int
    delay_s: float
    outcome: str
    progress: str
    failure: Failure | None
    checkpoint_step: int
    checkpoint_s: float | None
    held_dataset: bool
    revision: int
    created_s: float
    queued_s: float
    started_s: float | None
    ended_s: float | None
    updated_s: float


class Changes(TypedDict, total=False):
    """What may change together with a state, or in a heartbeat; see Work."""

    failure: Failure | None
    deaths: int
    retries: int
    delay_s: float
    step: int
    outcome: str
    progress: str
    held_dataset: bool


def stale_token(work: str, token: int) -> Aborted:
    """Returns the refusal of a write whose attempt is over or was never made."""
    return Aborted(
        "STALE_TOKEN",
        f"fencing token {token} is not that of a live attempt at {work[:80]}: stop that work at once",
        metadata={"fencing_token": str(token)},
        resource=work if len(work) <= 80 else "",
    )


def lost_race(work: str) -> Aborted:
    """Returns the refusal of a change that was decided on a state which is no longer the present one."""
    return Aborted("STATE_CHANGED", f"{work} changed meanwhile: read it again and decide anew", resource=work)
