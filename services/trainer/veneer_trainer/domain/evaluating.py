"""Evaluations as their owners, their workers and training jobs use them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from veneer_rpc.errors import FailedPrecondition, NotFound, Violation, invalid, violations
from veneer_rpc.names import (
    AdapterName,
    AdapterVersionName,
    EvaluationName,
    ModelName,
    ResourceName,
    parse_one_of,
)
from veneer_trainer.domain.adapters import PRODUCTION
from veneer_trainer.domain.control import Control
from veneer_trainer.domain.dispatch import Dispatch
from veneer_trainer.domain.evaluations import (
    Evaluation,
    EvaluationOrder,
    EvaluationSpec,
    Judgement,
    Metric,
    Sample,
    check_samples,
    evaluation_of,
    order_json,
)
from veneer_trainer.domain.jobs import TrainingJob
from veneer_trainer.domain.lifecycle import State, wrong_state
from veneer_trainer.domain.requests import Request
from veneer_trainer.domain.work import NewWork, Work, WorkKind, WorkRef
from veneer_trainer.evaluation_ports import EvaluationStore
from veneer_trainer.ports import Datasets, ModelCatalog, Requests, WorkStore
from veneer_trainer.registry_ports import RegistryStore

_SHARES = 1_000_000  # as in attempts: steps that a share of work done is counted in
_SAMPLES_BACK = 20  # at once: an answer may be long
_COMPARED = 100  # newest evaluations that a gate looks at


class Evaluations:
    """The use cases of EvaluationService, the worker's samples, and the EvaluationPlanner.

    Args:
        max_queued: evaluations of one tenant that may wait at once; planned ones are taken in any case.
        judged: is told (tenant, subject) of each verdict.
        (the rest): the ports and parts that it stands on.
    """

    def __init__(
        self,
        store: WorkStore,
        samples: EvaluationStore,
        registry: RegistryStore,
        catalog: ModelCatalog,
        datasets: Datasets,
        requests: Requests,
        dispatch: Dispatch,
        max_queued: int,
        judged: Callable[[str, str], None] = lambda tenant, subject: None,
    ) -> None:
        self._store = store
        self._samples = samples
        self._registry = registry
        self._catalog = catalog
        self._datasets = datasets
        self._requests = requests
        self._dispatch = dispatch
        self._max_queued = max_queued
        self._judged = judged
        self._control = Control(store)

    def create(self, request: Request, spec: EvaluationSpec) -> Evaluation:
        """Accepts an evaluation: when this returns it is durable.

        Raises:
            InvalidArgument: bounds, or a split that the data does not have.
            NotFound: subject or data.
            FailedPrecondition: the adapter has no version in production.
            ResourceExhausted: QUEUE_FULL.
            Unavailable: the dataset service does not answer.
        """
        if request.key is not None and (uid := self._requests.find(request.key, request.body_sha256)) is not None:
            return self._known(uid.decode())
        spec.check()
        order = self._pinned(request.tenant, spec)
        version = self._datasets.version(request.tenant, spec.dataset_version)
        if spec.split not in version.splits:
            text = f"{spec.dataset_version} has {', '.join(sorted(version.splits))}, not {spec.split!r}"
            raise invalid(Violation("spec.split", "SPLIT_UNKNOWN", text))
        new = _new_work(request.tenant, order)
        self._datasets.hold(request.tenant, spec.dataset_version, new.ref.name)
        made = None
        try:
            made = self._once(request, lambda: self._store.submit(new, self._max_queued))
        finally:
            if made is None or made.uid != new.uid:
                self._datasets.release(request.tenant, spec.dataset_version, new.ref.name)
        self._dispatch.settle(made)
        return self.view(made)

    def get(self, tenant: str, name: EvaluationName) -> Evaluation:
        """Returns an evaluation; raises NotFound."""
        return self.view(self._store.get(_ref(tenant, name)))

    def page(self, tenant: str, after: tuple[float, str] | None, limit: int, subject: str) -> list[Evaluation]:
        """Returns evaluations, newest first, older than a (created_s, uid)."""
        found = self._store.page(tenant, WorkKind.EVALUATION, after, limit, (), subject)
        return [self.view(work) for work in found]

    def cancel(self, request: Request, name: EvaluationName) -> Evaluation:
        """Stops an evaluation for good; see Control."""
        work = self._once(request, lambda: self._control.cancel(_ref(request.tenant, name)))
        self._dispatch.settle(work)
        return self.view(work)

    def delete(self, tenant: str, name: EvaluationName) -> None:
        """Forgets a finished evaluation with its samples; raises FailedPrecondition for another."""
        work = self._store.get(_ref(tenant, name))
        if not work.state.terminal:
            raise wrong_state(work.ref.name, work.state, State.CANCELLED)
        if work.held_dataset:
            self._datasets.release(tenant, self.view(work).spec.dataset_version, work.ref.name)
        self._store.delete(work)

    def samples(self, tenant: str, name: EvaluationName, after: int, limit: int, only_misses: bool) -> list[Sample]:
        """Returns samples by index, with one greater than `after`; raises NotFound."""
        return self._samples.samples(self._store.get(_ref(tenant, name)).uid, after, limit, only_misses)

    def put_samples(
        self, work: str, token: int, samples: Sequence[Sample], metrics: Sequence[Metric] | None, total: int
    ) -> int:
        """Stores what a worker was answered, and returns how many samples there are now.

        Raises:
            Aborted: STALE_TOKEN.
            InvalidArgument: the samples.
            FailedPrecondition: the work is no evaluation.
        """
        check_samples(samples, metrics or (), total)
        with self._store.together():
            held = self._store.fenced(work, token)
            if held.ref.kind is not WorkKind.EVALUATION:
                raise FailedPrecondition("NO_EVALUATION", f"{work[:80]} is no evaluation")
            figures = self._samples.put(held.uid, samples, metrics, total)
            if held.state is State.LEASED:
                held = self._store.move(held, State.RUNNING)
            self._store.change(held, step=round(figures.answered / total * _SHARES))
            return figures.answered

    def stored_samples(self, work: str, token: int, start: int) -> list[Sample]:
        """Returns a worker's own samples by index, the first at `start`; raises Aborted STALE_TOKEN."""
        return self._samples.samples(self._store.fenced(work, token).uid, start - 1, _SAMPLES_BACK, False)

    def check_complete(self, work: Work) -> None:
        """Lets an evaluation succeed whose samples are all there; raises FailedPrecondition INCOMPLETE."""
        figures = self._samples.figures(work.uid)
        if not figures.total or figures.answered < figures.total:
            text = f"{work.ref.name} has {figures.answered} of {figures.total} samples"
            raise FailedPrecondition("INCOMPLETE", text, resource=work.ref.name)

    def plan(self, tenant: str, job: TrainingJob) -> tuple[str, ...]:
        """See EvaluationPlanner."""
        names = []
        for planned in job.spec.evaluations:
            data = planned.dataset_version or job.spec.dataset_version
            spec = EvaluationSpec(job.outcome.adapter_version, data, planned.split, priority=job.spec.priority)
            order = EvaluationOrder(spec, job.outcome.adapter_digest)
            names.append(self._store.submit(_new_work(tenant, order), None).ref.name)
        return tuple(names)

    def settle(self, tenant: str, evaluations: Iterable[str]) -> None:
        """See EvaluationPlanner."""
        for name in evaluations:
            self._dispatch.settle(self._store.get(_ref(tenant, EvaluationName.parse(name))))

    def figures(self, tenant: str, metric: str, version: str, against: str) -> tuple[float | None, float | None]:
        """Returns a version's newest figure and another's on the same rows; None where there is none.

        Args:
            tenant: whose.
            metric: its name.
            version: the version's name.
            against: the other's; empty for none.
        """
        mine = self._succeeded(tenant, version, metric)
        if against:
            theirs = {
                each.spec.rows: each.figure(metric) for each in reversed(self._succeeded(tenant, against, metric))
            }
            for each in mine:
                if each.spec.rows in theirs:
                    return each.figure(metric), theirs[each.spec.rows]
        return (mine[0].figure(metric) if mine else None), None

    def judge(self, request: Request, judgement: Judgement) -> Judgement:
        """Records a verdict.

        Raises:
            InvalidArgument: its bounds or names.
            NotFound: a subject, the evaluation or its sample.
        """
        with violations() as found:
            judgement.check(found)
        for subject in filter(None, (judgement.subject, judgement.other_subject)):
            self._digest_of(request.tenant, _subject(subject, "judgement.subject"))
        if judgement.evaluation:
            name = EvaluationName.parse(judgement.evaluation, "judgement.evaluation")
            index = judgement.sample_index
            if not [each for each in self.samples(request.tenant, name, index - 1, 1, False) if each.index == index]:
                raise NotFound("SAMPLE_UNKNOWN", f"{name} has no sample {index}", resource=str(name))
        judgement = replace(judgement, judge=request.actor)

        def act() -> Judgement:
            made = self._samples.judge(request.tenant, judgement)
            for subject in filter(None, (judgement.subject, judgement.other_subject)):
                self._judged(request.tenant, subject)
            return made

        with self._store.together():
            if request.key is None:
                return act()
            uid = self._requests.once(request.key, request.body_sha256, lambda: act().uid.encode()).decode()
            return self._samples.judgement(uid)

    def judgements(self, tenant: str, before: tuple[float, str] | None, limit: int, subject: str) -> list[Judgement]:
        """Returns verdicts, newest first, older than a (created_s, uid)."""
        return self._samples.judgements(tenant, before, limit, subject)

    def view(self, work: Work) -> Evaluation:
        """Returns the evaluation that a piece of work is, with its figures."""
        return evaluation_of(work, self._samples.figures(work.uid))

    def _succeeded(self, tenant: str, subject: str, metric: str) -> list[Evaluation]:
        found = self._store.page(tenant, WorkKind.EVALUATION, None, _COMPARED, [State.SUCCEEDED], subject)
        return [each for each in map(self.view, found) if each.figure(metric) is not None]

    def _pinned(self, tenant: str, spec: EvaluationSpec) -> EvaluationOrder:
        name = _subject(spec.subject, "spec.subject", AdapterName)
        if isinstance(name, AdapterName):
            number = self._registry.get(tenant, name).aliases.get(PRODUCTION)
            if number is None:
                raise FailedPrecondition("ALIAS_UNSET", f"{name} has no alias {PRODUCTION}", resource=str(name))
            name = AdapterVersionName(name.adapter, number)
        return EvaluationOrder(replace(spec, subject=str(name)), self._digest_of(tenant, name))

    def _digest_of(self, tenant: str, name: ResourceName) -> str:
        if isinstance(name, AdapterVersionName):
            return self._registry.version(tenant, name).digest
        return self._catalog.get(ModelName.parse(str(name))).digest

    def _once(self, request: Request, act: Callable[[], Work]) -> Work:
        if request.key is None:
            return act()
        uid = self._requests.once(request.key, request.body_sha256, lambda: act().uid.encode()).decode()
        return self._known(uid).work

    def _known(self, uid: str) -> Evaluation:
        work = self._store.find(uid)
        if work is None:
            raise NotFound("WORK_UNKNOWN", "the evaluation that this request made has been deleted")
        return self.view(work)


def _new_work(tenant: str, order: EvaluationOrder) -> NewWork:
    uid, spec = str(uuid.uuid4()), order.spec
    ref = WorkRef(tenant, WorkKind.EVALUATION, f"evaluation-{uid}")
    return NewWork(ref, uid, order_json(order), spec.subject, spec.priority, dataset_version=str(spec.dataset_version))


def _subject(text: str, field: str, *more: type[ResourceName]) -> ResourceName:
    kinds: tuple[type[ResourceName], ...] = (AdapterVersionName, *more, ModelName)
    return parse_one_of(text, field, *kinds)


def _ref(tenant: str, name: EvaluationName) -> WorkRef:
    return WorkRef(tenant, WorkKind.EVALUATION, name.evaluation)
