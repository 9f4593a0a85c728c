"""What the trainer's domain needs of the world. Adapters keep these promises; `__main__` chooses them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Unpack

from veneer_rpc.idempotency import IdempotencyStore, RequestKey
from veneer_rpc.names import DatasetVersionName, ModelName
from veneer_trainer.domain.adapters import AdapterVersion
from veneer_trainer.domain.fair_share import Lane
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Contract, Point, Progress, TrainingJob
from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.spec import TrainingSpec
from veneer_trainer.domain.targets import Linear
from veneer_trainer.domain.work import Attempt, Changes, NewWork, Work, WorkKind, WorkRef


class WorkStore(Protocol):
    """Queued work of every kind, durable when a method returns. The database that decides.

    Every change compares (state, token) with what its caller has read and raises `Aborted` STATE_CHANGED
    where they are no longer so; then read again and decide anew. Inside `Database.write` all of them join
    that transaction.
    """

    def submit(self, new: NewWork, max_queued: int | None) -> Work:
        """Accepts work as QUEUED.

        Raises:
            AlreadyExists: the name is taken.
            ResourceExhausted: the tenant has `max_queued` of the kind waiting, or all tenants together have as much as
                may wait. With None it is taken in any case.
        """

    def get(self, ref: WorkRef) -> Work:
        """Returns work; raises NotFound, for another tenant's too."""

    def find(self, uid: str) -> Work | None:
        """Returns work by its uid, whoever owns it; None when it was deleted."""

    def page(
        self,
        tenant: str,
        kind: WorkKind,
        after: tuple[float, str] | None,
        limit: int,
        states: Collection[State] = (),
        subject: str = "",
    ) -> list[Work]:
        """Returns a tenant's work, newest first, older than `after`, a (created_s, uid)."""

    def in_states(self, states: Iterable[State], tenant: str = "") -> list[Work]:
        """Returns the work of one or all tenants that is in one of some states, longest waiting first."""

    def counts(self) -> Mapping[tuple[WorkKind, State], int]:
        """Returns how much work of a kind is in a state; what is not there is 0."""

    def with_holds(self) -> list[Work]:
        """Returns the work for which a hold at the dataset service may exist."""

    def queue_position(self, work: Work) -> int:
        """Returns how much QUEUED work of the same tenant, kind and priority comes before this."""

    def attempts(self, uid: str, limit: int = 100) -> list[Attempt]:
        """Returns the newest attempts, oldest first."""

    def lease(self, work: Work, worker: str, resumed_step: int) -> Work:
        """Moves QUEUED work to LEASED under a new fencing token."""

    def move(self, work: Work, then: State, **changes: Unpack[Changes]) -> Work:
        """Moves work to another state; ends the attempt, with `failure`, where the new state is not held.

        Raises:
            FailedPrecondition: WRONG_STATE: the table has no such transition.
        """

    def change(self, work: Work, **changes: Unpack[Changes]) -> Work:
        """Changes work that stays in its state."""

    def fenced(self, name: str, token: int) -> Work:
        """Returns the work that a live attempt holds.

        Raises:
            Aborted: STALE_TOKEN: another attempt came after, or this one has ended.
        """

    def beat(self, name: str, token: int, **changes: Unpack[Changes]) -> Work:
        """Notes a heartbeat; raises as `fenced`."""

    def checkpointing(self, name: str, token: int, step: int) -> AbstractContextManager[Any]:
        """Notes a checkpoint around the rename that makes it real; the token cannot go stale inside.

        Forgives the deaths so far if it is further than the last one.

        Raises:
            Aborted: as `fenced`, on entering.
        """

    def together(self) -> AbstractContextManager[Any]:
        """Makes several changes durable at once or not at all. No call to another machine inside."""

    def delete(self, work: Work) -> None:
        """Forgets work in a terminal state, attempts included."""


@dataclass(frozen=True, slots=True)
class QueueContents:
    """Uids in a queue: those that wait, and those that were taken and neither forgotten nor put back."""

    waiting: frozenset[str]
    taken: frozenset[str]


class WorkQueue(Protocol):
    """Who comes next. Holds uids and decides nothing: it may lose everything and be filled again.

    Within a lane first come, first served. Between tenants fair by weight; within a tenant `high` first;
    `low` only when nothing else waits that the worker can do.

    Raises:
        Unavailable: any method, while the queue cannot be reached.
    """

    def add(self, uid: str, lane: Lane) -> bool:
        """Lets work wait at the end of its lane. False when it is there already, waiting or taken."""

    def take(self, worker: str, can_run: Callable[[Lane], bool]) -> str | None:
        """Takes the next work out of the lanes that a worker can run; no two callers get the same."""

    def lanes(self) -> frozenset[Lane]:
        """Returns the lanes in which work waits; one whose last work was just taken may still be among them."""

    def put_back(self, uid: str) -> None:
        """Lets taken work wait again, at the end of its lane; does nothing for work that is not taken."""

    def forget(self, uid: str) -> None:
        """Removes work, waiting or taken; does nothing for work that is not there."""

    def contents(self) -> QueueContents:
        """Returns what is in the queue now."""


class CheckpointStore(Protocol):
    """Checkpoints of training runs: whole or not at all, the last two good ones kept."""

    def begin(self, uid: str, token: int, step: int, files: Collection[StoredFile]) -> CheckpointWriter:
        """Opens a new checkpoint; raises ResourceExhausted where there is no room."""

    def newest(self, uid: str) -> StoredCheckpoint | None:
        """Returns the newest checkpoint by its manifest, its bytes unread."""

    def newest_good(self, uid: str) -> StoredCheckpoint | None:
        """Returns the newest checkpoint whose files all have their digests; damaged ones are removed."""

    def forget(self, uid: str) -> None:
        """Removes every checkpoint of a job."""

    def owners(self) -> list[str]:
        """Returns the uids of jobs that have a folder."""


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint on disk."""

    folder: Path
    step: int
    token: int
    files: tuple[StoredFile, ...]
    created_s: float


class FileReceiver(Protocol):
    """Takes announced files piece by piece and checks them."""

    def write(self, path: str, data: bytes) -> None:
        """Appends to a file; raises OutOfRange past its announced size, InvalidArgument for another path."""

    def abandon(self) -> None:
        """Removes what has been received; does nothing after a success."""


class CheckpointWriter(FileReceiver, Protocol):
    """A checkpoint under way."""

    def finish(self, fence: Callable[[int], AbstractContextManager[Any]]) -> StoredCheckpoint:
        """Makes the checkpoint the newest.

        Args:
            fence: given the step, what to be in for the rename; what it raises leaves nothing behind.

        Raises:
            DataLoss: a file is short, missing, or not what its digest says.
        """


class Curves(Protocol):
    """The course of jobs' figures. A convenience: what cannot be written is left out."""

    def append(self, job: WorkRef, points: Iterable[Point]) -> None:
        """Adds points."""

    def read(self, job: WorkRef) -> list[Point]:
        """Returns a job's points by growing step; of a step that was done twice the later one."""

    def forget(self, job: WorkRef) -> None:
        """Removes a job's points."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the trainer knows of a base without loading it.

    Attributes:
        linears: every linear that an adapter may sit on, by whole module name.
    """

    name: ModelName
    digest: str
    context_length: int
    max_pixels: int
    linears: Mapping[str, Linear]


class ModelCatalog(Protocol):
    """The base models of the deployment."""

    def get(self, name: ModelName) -> BaseModel:
        """Returns a base; raises NotFound."""

    def contract(self, name: ModelName, max_pixels: int) -> Contract:
        """Returns the base's processing contract with a bound on pictures' area, in pixels; raises NotFound."""


@dataclass(frozen=True, slots=True)
class PublishHeader:
    """What a worker says of an adapter that it publishes."""

    digest: str
    files: tuple[StoredFile, ...]
    final_progress: Progress
    code_version: str = ""


class Registry(Protocol):
    """Adapter versions, as far as training jobs publish and name them."""

    def publish(
        self, tenant: str, job: TrainingJob, header: PublishHeader, folder: Path, fence: Callable[[], Any]
    ) -> AdapterVersion:
        """Makes a trained PEFT folder the next version of the job's adapter; at most one for a job (its uid).

        Args:
            tenant: who owns both.
            job: the job, its spec and what was resolved for it.
            header: what the worker announced; sizes and SHA-256 of the files hold already.
            folder: the files; the registry copies or moves them, the caller removes what is left.
            fence: to be called in the transaction that inserts the version, before it does. What it raises
                must leave no version.

        Raises:
            DataLoss: the adapter's digest is not the announced one.
            FailedPrecondition: what is wrong with the adapter.
        """

    def check_adapter(self, tenant: str, spec: TrainingSpec) -> None:
        """Checks at admission that a job's adapter, if any, is of its base, and its initial version fits.

        Raises:
            NotFound: the initial version does not exist.
            FailedPrecondition: the adapter stands on another base, or rank, alpha or targets differ.
        """


class EvaluationPlanner(Protocol):
    """Queues the evaluations that a job asked for, and says when one is done."""

    def check_complete(self, work: Work) -> None:
        """Lets an evaluation succeed; raises FailedPrecondition INCOMPLETE while samples are missing."""

    def plan(self, tenant: str, job: TrainingJob) -> tuple[str, ...]:
        """Queues `job.spec.evaluations` of `job.outcome.adapter_version`, and returns their names.

        Called in the transaction that ends the job: what it submits is durable with that, or not at all.
        """

    def settle(self, tenant: str, evaluations: Iterable[str]) -> None:
        """Lets the planned evaluations wait for a worker, once they are durable."""


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """What the dataset service knows of a split; token counts are None where no model was named."""

    rows: int
    visual_tokens: int | None = None
    prompt_tokens: int | None = None
    supervised_tokens: int | None = None
    longest_row: int | None = None


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """What the dataset service knows of a version.

    `histogram` has (least length in tokens, rows) over all splits, ascending; `model` and `contract_digest`
    say by which contract tokens were counted, empty for none.
    """

    name: DatasetVersionName
    splits: Mapping[str, SplitFacts]
    model: str = ""
    contract_digest: str = ""
    histogram: tuple[tuple[int, int], ...] = ()


class Datasets(Protocol):
    """The dataset service, asked for a tenant.

    Raises:
        Unavailable: any method, while the service is away.
    """

    def version(self, tenant: str, name: DatasetVersionName) -> VersionFacts:
        """Returns what is known of a version; raises NotFound."""

    def hold(self, tenant: str, name: DatasetVersionName, holder: str) -> None:
        """Keeps a version from being deleted for a day; raises NotFound."""

    def release(self, tenant: str, name: DatasetVersionName, holder: str) -> None:
        """Ends a hold; does nothing where there is none."""


class Requests(IdempotencyStore, Protocol):
    """What mutations with a `request_id` returned; an act inside `once` commits together with its record."""

    def find(self, key: RequestKey, body_sha256: bytes) -> bytes | None:
        """Returns what a request returned the first time; None for one that has not succeeded yet.

        Raises:
            AlreadyExists: the id came with another body before.
        """


class Delegations(Protocol):
    """Credentials that let a worker act for a tenant."""

    def for_worker(self, worker: str, tenant: str) -> str:
        """Returns a fresh credential."""


class History(Protocol):
    """What this process did, for the checker of the fault tests."""

    def record(self, event: str, **facts: str | int | float | bool) -> None:
        """Appends one event."""
