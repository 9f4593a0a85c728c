"""Queue and store against each other, and leases against a clock that the test moves."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from veneer_rpc.errors import FailedPrecondition, Unavailable
from veneer_trainer.adapters import work_store
from veneer_trainer.adapters.database import Database
from veneer_trainer.adapters.memory_queue import MemoryQueue
from veneer_trainer.domain.control import Control
from veneer_trainer.domain.dispatch import Dispatch
from veneer_trainer.domain.fair_share import Lane
from veneer_trainer.domain.leases import ChangeWatch
from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.retries import RetryPolicy
from veneer_trainer.domain.work import Needs, NewWork, Work, WorkKind, WorkRef
from veneer_trainer.domain.workers import Worker

WORKER = Worker("w", "cpu", "c", frozenset({"float32"}), 4 << 30, {"models/m": "digest"})
KINDS = {WorkKind.TRAINING}


@dataclass
class History:
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def record(self, event: str, **facts: str | float | bool) -> None:
        self.events.append((event, facts))


class Unreachable(MemoryQueue):
    def add(self, uid: str, lane: Lane) -> bool:
        raise Unavailable("QUEUE_UNAVAILABLE", "away")

    def forget(self, uid: str) -> None:
        raise Unavailable("QUEUE_UNAVAILABLE", "away")


@dataclass
class Bench:
    database: Database
    queue: MemoryQueue = field(default_factory=lambda: MemoryQueue({}))
    now_s: float = 0.0
    max_leased: int = 99
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.store = work_store.SqlWorkStore(self.database)
        self.restart()

    def restart(self) -> None:
        watch = ChangeWatch(1000, clock=lambda: self.now_s)
        policy = RetryPolicy(max_deaths=2, max_retries=2, first_delay_s=5)
        self.dispatch = Dispatch(self.store, self.queue, policy, watch, self.history, 10, 60, self.max_leased)

    def submit(self, tenant: str = "acme", **needs: Any) -> Work:  # noqa: ANN401  # of Needs
        ref = WorkRef(tenant, WorkKind.TRAINING, f"w{uuid.uuid4()}")
        return self.store.submit(NewWork(ref, str(uuid.uuid4()), "{}", needs=Needs(**needs)), 99)

    def sweep(self, after_s: float) -> None:
        self.now_s += after_s
        self.dispatch.sweep()

    def state(self, work: Work) -> State:
        return self.store.get(work.ref).state


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    database = Database(tmp_path / "x.db", [work_store.SCHEMA])
    yield Bench(database)
    database.close()


def test_reconciling_adds_what_is_missing_once_and_removes_what_waits_no_more(bench: Bench) -> None:
    missing, waiting, cancelled = (bench.submit() for _ in range(3))
    bench.dispatch.settle(waiting)
    bench.dispatch.settle(cancelled)
    bench.store.move(cancelled, State.CANCELLED)
    for _ in range(2):
        bench.dispatch.reconcile()
    assert bench.queue.contents().waiting == {missing.uid, waiting.uid}
    assert [event for event, _ in bench.history.events] == ["requeued"]


def test_what_a_dead_process_took_waits_again(bench: Bench) -> None:
    taken, leased = bench.submit(), bench.submit()
    for work in (taken, leased):
        bench.dispatch.settle(work)
        bench.queue.take("w", lambda lane: True)
    bench.store.lease(leased, "w", 0)
    bench.dispatch.reconcile()
    contents = bench.queue.contents()
    assert (contents.waiting, contents.taken) == ({taken.uid}, frozenset())


def test_without_a_queue_work_waits_for_the_reconciler(bench: Bench) -> None:
    reachable, bench.queue = bench.queue, Unreachable({})
    bench.restart()
    work = bench.submit()
    bench.dispatch.settle(work)
    bench.queue = reachable
    bench.restart()
    assert bench.dispatch.acquire(WORKER, KINDS) is None
    bench.dispatch.reconcile()
    assert (bench.dispatch.acquire(WORKER, KINDS) or work).state is State.LEASED


def test_a_worker_gets_what_it_can_do_and_tenants_have_a_quota(bench: Bench) -> None:
    for needs in ({"memory_bytes": 5 << 30}, {"model_digest": "other"}, {"dtype": "bfloat16"}):
        bench.dispatch.settle(bench.submit(**needs))
    assert bench.dispatch.acquire(WORKER, KINDS) is None
    bench.max_leased = 1
    bench.restart()
    for tenant in ("acme", "acme", "other"):
        bench.dispatch.settle(bench.submit(tenant, model_digest="digest", dtype="float32", memory_bytes=4 << 30))
    assert bench.dispatch.acquire(WORKER, {WorkKind.EVALUATION}) is None
    taken = [bench.dispatch.acquire(WORKER, KINDS) for _ in range(3)]
    assert [work and work.ref.tenant for work in taken] == ["acme", "other", None]


def lease(bench: Bench) -> Work:
    bench.dispatch.settle(bench.submit())
    work = bench.dispatch.acquire(WORKER, KINDS)
    assert work is not None
    bench.dispatch.sweep()
    return work


def test_a_lease_lives_by_heartbeats_alone(bench: Bench) -> None:
    work = lease(bench)
    for step in range(1, 6):
        bench.store.beat(work.ref.name, work.token, step=step)
        bench.sweep(9)
        assert bench.state(work) is State.LEASED
    bench.sweep(9)
    assert bench.state(work) is State.LEASED
    bench.sweep(2)
    assert bench.state(work) is State.QUEUED
    assert bench.queue.contents().waiting == {work.uid}


def test_a_new_process_gives_every_lease_its_whole_time(bench: Bench) -> None:
    work = lease(bench)
    bench.now_s += 9
    bench.restart()
    bench.sweep(9)
    bench.sweep(9)
    assert bench.state(work) is State.LEASED
    bench.sweep(2)
    assert bench.state(work) is State.QUEUED


def test_heartbeats_without_steps_count_for_the_stall_limit_only(bench: Bench) -> None:
    work = lease(bench)
    for _ in range(6):
        bench.store.beat(work.ref.name, work.token)
        bench.sweep(10)
    assert bench.state(work) is State.LEASED
    bench.store.beat(work.ref.name, work.token)
    bench.sweep(1)
    assert bench.state(work) is State.QUEUED
    assert (bench.store.get(work.ref).failure or work.failure).reason == "PROGRESS_STALLED"  # type: ignore[union-attr]


def test_the_last_death_is_final_and_its_cause_stays(bench: Bench) -> None:
    work = lease(bench)
    bench.sweep(11)
    again = bench.dispatch.acquire(WORKER, KINDS)
    assert again is not None
    bench.dispatch.sweep()
    bench.sweep(11)
    buried = bench.store.get(work.ref)
    assert buried.state is State.DEAD_LETTERED
    assert buried.failure is not None
    assert buried.failure.reason == "LEASE_LOST"
    retried = Control(bench.store).retry(work.ref)
    assert (retried.state, retried.deaths) == (State.QUEUED, 0)


def test_a_delayed_retry_waits_its_time_by_the_own_clock(bench: Bench) -> None:
    work = lease(bench)
    queued = bench.store.move(work, State.QUEUED, delay_s=5.0, retries=1)
    bench.dispatch.settle(queued)
    bench.dispatch.reconcile()
    bench.dispatch.sweep()
    bench.sweep(4)
    assert not bench.queue.contents().waiting
    bench.sweep(2)
    assert bench.queue.contents().waiting == {work.uid}
    assert bench.store.get(work.ref).delay_s == 0


def test_owners_stop_at_once_what_nobody_holds(bench: Bench) -> None:
    control, work = Control(bench.store), bench.submit()
    assert control.pause(work.ref).state is State.PAUSED
    assert control.resume(work.ref).state is State.QUEUED
    assert control.cancel(work.ref).state is State.CANCELLED
    for act in (control.cancel, control.pause, control.resume, control.retry):
        with pytest.raises(FailedPrecondition, match="is CANCELLED and cannot become"):
            act(work.ref)


def test_resume_and_retry_take_nothing_from_a_worker(bench: Bench) -> None:
    control, work = Control(bench.store), lease(bench)
    for act in (control.resume, control.retry):
        with pytest.raises(FailedPrecondition, match="is LEASED"):
            act(work.ref)
    assert control.cancel(work.ref).state is State.CANCELLING
    assert control.cancel(work.ref).state is State.CANCELLING


def test_only_work_that_may_share_joins_what_a_worker_has_begun(bench: Bench) -> None:
    begun, alike, other, alone = (bench.submit(shares=shares) for shares in ("s", "s", "t", ""))
    for work in (begun, alike, other, alone):
        bench.dispatch.settle(work)
    held = bench.dispatch.acquire(WORKER, KINDS)
    assert held is not None
    assert held.uid == begun.uid
    joined = bench.dispatch.acquire(WORKER, KINDS, beside=held)
    assert joined is not None
    assert joined.uid == alike.uid
    assert bench.dispatch.acquire(WORKER, KINDS, beside=held) is None
    solo = [bench.dispatch.acquire(WORKER, KINDS) for _ in range(2)]
    assert [work and work.uid for work in solo] == [other.uid, alone.uid]
    assert solo[1] is not None
    assert bench.dispatch.acquire(WORKER, KINDS, beside=solo[1]) is None


@pytest.mark.parametrize(
    ("tenant", "priority", "joins"),
    [("acme", "normal", True), ("acme", "low", True), ("acme", "high", False), ("else", "normal", False),
     ("else", "low", True), ("else", "high", False)],
)  # fmt: skip
def test_nobody_joins_before_somebody_whose_turn_comes_sooner(
    bench: Bench, tenant: str, priority: str, *, joins: bool
) -> None:
    begun, alike = bench.submit(shares="s"), bench.submit(shares="s")
    bench.dispatch.settle(begun)
    held = bench.dispatch.acquire(WORKER, KINDS)
    bench.dispatch.settle(alike)
    bench.queue.add("another", Lane(tenant, "trainingJobs", priority, "digest", "", 0))
    got = bench.dispatch.acquire(WORKER, KINDS, beside=held)
    assert (got is not None) == joins
    bench.queue.add("elsewhere", Lane("else", "trainingJobs", "normal", "of another worker", "", 0))
    if joins:
        another = bench.submit(shares="s")
        bench.dispatch.settle(another)
        assert bench.dispatch.acquire(WORKER, KINDS, beside=held) is not None


def test_what_was_lost_once_trains_alone(bench: Bench) -> None:
    work = bench.submit(shares="s")
    bench.dispatch.settle(work)
    bench.dispatch.acquire(WORKER, KINDS)
    bench.sweep(0)
    bench.sweep(11)
    lost = bench.store.get(work.ref)
    assert Lane.of(work).shares == "s"
    assert (lost.deaths, Lane.of(lost).shares) == (1, "")
