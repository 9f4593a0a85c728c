"""Training jobs as their owners see them: create, look at, steer, forget."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from veneer_rpc.errors import NotFound, Violation, invalid
from veneer_rpc.names import AdapterName, DatasetVersionName, TrainingJobName, is_id
from veneer_trainer.domain.admission import Admission, Admitted
from veneer_trainer.domain.control import Control
from veneer_trainer.domain.curves import thinned
from veneer_trainer.domain.dispatch import Dispatch
from veneer_trainer.domain.jobs import Estimate, Order, Point, TrainingJob, as_json, job_of
from veneer_trainer.domain.lifecycle import TERMINAL, State, wrong_state
from veneer_trainer.domain.requests import Request
from veneer_trainer.domain.spec import TrainingSpec
from veneer_trainer.domain.work import Attempt, NewWork, Work, WorkKind, WorkRef
from veneer_trainer.failpoints import failpoint
from veneer_trainer.ports import CheckpointStore, Curves, Datasets, History, Requests, WorkStore

_MAX_LABELS = 64
_MAX_DISPLAY_NAME = 200
_MAX_LABEL_VALUE = 63
_LABEL_KEY = re.compile(r"[a-z0-9_-]{1,63}")


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to create; an empty id or display name is made up."""

    id: str
    spec: TrainingSpec
    display_name: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class JobView:
    """A job with what stands beside it in the store."""

    job: TrainingJob
    attempts: tuple[Attempt, ...] = ()
    queue_position: int = 0


class TrainingJobs:
    """The use cases of TrainerService.

    Args:
        max_queued: jobs of one tenant that may wait at once.
        (the rest): the ports and parts that it stands on.
    """

    def __init__(
        self,
        store: WorkStore,
        requests: Requests,
        admission: Admission,
        datasets: Datasets,
        checkpoints: CheckpointStore,
        curves: Curves,
        dispatch: Dispatch,
        history: History,
        max_queued: int,
    ) -> None:
        self._store = store
        self._requests = requests
        self._admission = admission
        self._datasets = datasets
        self._checkpoints = checkpoints
        self._curves = curves
        self._dispatch = dispatch
        self._history = history
        self._max_queued = max_queued
        self._control = Control(store)

    def estimate(self, tenant: str, spec: TrainingSpec) -> Estimate:
        """Says what a job would take; raises as `Admission.judge`."""
        return self._admission.judge(tenant, spec).estimate

    def validate(self, tenant: str, new: NewJob) -> Order:
        """Checks a job and keeps nothing; raises as `create`, but for a name that is taken."""
        check_new(new)
        return _order(new, self._admission.admit(tenant, new.spec))

    def create(self, request: Request, new: NewJob) -> JobView:
        """Accepts a job: when this returns it is durable, and queued as soon as there is a queue.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition, ResourceExhausted, Unavailable: as
                `Admission.admit`, and where the id or a label is malformed.
            AlreadyExists: the id is taken, or the request id came with another body.
            ResourceExhausted: QUEUE_FULL.
        """
        if (first := self._first(request)) is not None:
            return first
        check_new(new)
        admitted = self._admission.admit(request.tenant, new.spec)
        spec, uid = admitted.spec, str(uuid.uuid4())
        ref = WorkRef(request.tenant, WorkKind.TRAINING, new.id or f"job-{uid}")
        order = _order(new, admitted)
        work = NewWork(
            ref, uid, as_json(order), str(spec.adapter), spec.priority, admitted.needs, str(spec.dataset_version)
        )
        self._datasets.hold(request.tenant, spec.dataset_version, ref.name)
        try:
            made = self._once(request, lambda: self._store.submit(work, self._max_queued))
        finally:
            self._release_unless_owned(ref, spec.dataset_version)
        failpoint("job.durable")
        if made.uid == uid:
            self._history.record("submitted", work=uid)
        self._dispatch.settle(made)
        return self.view(made)

    def get(self, tenant: str, name: TrainingJobName) -> JobView:
        """Returns a job; raises NotFound."""
        return self.view(self._store.get(_ref(tenant, name)))

    def curve(self, tenant: str, name: TrainingJobName, max_points: int) -> list[Point]:
        """Returns the course of a job's figures, thinned to about so many points; raises NotFound."""
        return thinned(self._curves.read(self._store.get(_ref(tenant, name)).ref), max_points)

    def page(
        self,
        tenant: str,
        after: tuple[float, str] | None,
        limit: int,
        states: Collection[State],
        adapter: AdapterName | None,
    ) -> list[JobView]:
        """Returns jobs, newest first, older than `after`, a (created_s, uid)."""
        found = self._store.page(tenant, WorkKind.TRAINING, after, limit, states, str(adapter or ""))
        return [self.view(work) for work in found]

    def cancel(self, request: Request, name: TrainingJobName) -> JobView:
        """See Control; a job that nobody holds loses its checkpoints too."""
        view = self._steer(request, name, self._control.cancel)
        if view.job.work.state is State.CANCELLED:
            self._checkpoints.forget(view.job.work.uid)
        return view

    def pause(self, request: Request, name: TrainingJobName) -> JobView:
        """See Control."""
        return self._steer(request, name, self._control.pause)

    def resume(self, request: Request, name: TrainingJobName) -> JobView:
        """See Control."""
        return self._steer(request, name, self._control.resume)

    def retry(self, request: Request, name: TrainingJobName) -> JobView:
        """See Control; raises NotFound where the data is gone meanwhile, and Unavailable."""
        if (first := self._first(request)) is not None:
            return first
        work = self._store.get(_ref(request.tenant, name))
        if work.state in TERMINAL:  # its hold was released
            self._datasets.hold(request.tenant, job_of(work).spec.dataset_version, work.ref.name)
        try:
            return self._steer(request, name, self._control.retry)
        finally:
            self._release_unless_owned(work.ref, job_of(work).spec.dataset_version)

    def delete(self, tenant: str, name: TrainingJobName) -> None:
        """Forgets a finished job, its checkpoints and its curve.

        Raises:
            FailedPrecondition: it is not in a terminal state.
            Unavailable: its hold cannot be released now.
        """
        work = self._store.get(_ref(tenant, name))
        if not work.state.terminal:
            raise wrong_state(work.ref.name, work.state, State.CANCELLED)
        if work.held_dataset:
            self._datasets.release(tenant, job_of(work).spec.dataset_version, work.ref.name)
        self._curves.forget(work.ref)
        self._store.delete(work)
        self._checkpoints.forget(work.uid)

    def _steer(self, request: Request, name: TrainingJobName, act: Callable[[WorkRef], Work]) -> JobView:
        if (first := self._first(request)) is not None:
            return first
        moved = self._once(request, lambda: act(_ref(request.tenant, name)))
        self._dispatch.settle(moved)
        return self.view(moved)

    def _once(self, request: Request, act: Callable[[], Work]) -> Work:
        """Acts, once for a request id, and returns the work as it is now."""
        if request.key is None:
            return act()
        uid = self._requests.once(request.key, request.body_sha256, lambda: act().uid.encode()).decode()
        return self._known(uid)

    def _first(self, request: Request) -> JobView | None:
        """What a repeated request returned the first time, as it is now."""
        if request.key is None:
            return None
        uid = self._requests.find(request.key, request.body_sha256)
        return None if uid is None else self.view(self._known(uid.decode()))

    def _known(self, uid: str) -> Work:
        work = self._store.find(uid)
        if work is None:
            raise NotFound("WORK_UNKNOWN", "the job that this request made has been deleted")
        return work

    def view(self, work: Work) -> JobView:
        """Returns a job with what stands beside it."""
        position = self._store.queue_position(work) if work.state is State.QUEUED else 0
        return JobView(job_of(work), tuple(self._store.attempts(work.uid)), position)

    def _release_unless_owned(self, ref: WorkRef, version: DatasetVersionName) -> None:
        """Releases the hold of a job that was not made after all; an unfinished one of the name keeps it."""
        try:
            owned = not self._store.get(ref).state.terminal
        except NotFound:
            owned = False
        if not owned:
            self._datasets.release(ref.tenant, version, ref.name)


def check_new(new: NewJob) -> None:
    """Checks what a job is called.

    Raises:
        InvalidArgument: the id, the display name or the labels are malformed, with every violation.
    """
    found = []
    if new.id and not is_id(new.id):
        text = f"must be 1-63 of a-z, 0-9 and '-', starting with a letter, was {new.id[:80]!r}"
        found.append(Violation("training_job_id", "INVALID_ID", text))
    if len(new.display_name) > _MAX_DISPLAY_NAME:
        text = f"at most {_MAX_DISPLAY_NAME} characters, were {len(new.display_name)}"
        found.append(Violation("training_job.display_name", "TOO_LONG", text))
    if len(new.labels) > _MAX_LABELS:
        text = f"at most {_MAX_LABELS} labels, were {len(new.labels)}"
        found.append(Violation("training_job.labels", "TOO_MANY", text))
    for key, value in new.labels.items():
        if not _LABEL_KEY.fullmatch(key) or len(value) > _MAX_LABEL_VALUE:
            text = f"keys are 1-63 of a-z, 0-9, '-' and '_', values at most {_MAX_LABEL_VALUE} characters"
            found.append(Violation(f"training_job.labels[{key[:63]!r}]", "INVALID_LABEL", text))
    if found:
        raise invalid(*found)


def _order(new: NewJob, admitted: Admitted) -> Order:
    return Order(admitted.spec, new.display_name, new.labels, admitted.estimate)


def _ref(tenant: str, name: TrainingJobName) -> WorkRef:
    return WorkRef(tenant, WorkKind.TRAINING, name.training_job)
