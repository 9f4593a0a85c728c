"""What the WorkStore promises, on a real database file."""

import dataclasses
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from veneer_rpc.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted
from veneer_rpc.idempotency import RequestKey
from veneer_trainer.adapters import requests, work_store
from veneer_trainer.adapters.database import Database, Schema
from veneer_trainer.domain.lifecycle import HELD, State
from veneer_trainer.domain.work import Failure, Needs, NewWork, Work, WorkKind, WorkRef
from veneer_trainer.ports import WorkStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trainer.db"


@pytest.fixture
def changed() -> list[str]:
    return []


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = Database(path, [work_store.SCHEMA, requests.SCHEMA])
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database, changed: list[str]) -> WorkStore:
    return work_store.SqlWorkStore(database, changed.append)


def new(name: str, tenant: str = "acme", kind: WorkKind = WorkKind.TRAINING, subject: str = "") -> NewWork:
    needs = Needs("digest", "float32", 7)
    return NewWork(WorkRef(tenant, kind, name), str(uuid.uuid4()), "{}", subject, needs=needs, dataset_version="v")


def leased(store: WorkStore, name: str = "a") -> Work:
    return store.lease(store.submit(new(name), 10), "w", 0)


def test_work_is_counted_by_kind_and_state(store: WorkStore) -> None:
    assert store.counts() == {}
    leased(store)
    for name, tenant in (("b", "acme"), ("b", "other")):
        store.submit(new(name, tenant), 10)
    store.submit(new("a", kind=WorkKind.EVALUATION), 10)
    assert store.counts() == {
        (WorkKind.TRAINING, State.LEASED): 1,
        (WorkKind.TRAINING, State.QUEUED): 2,
        (WorkKind.EVALUATION, State.QUEUED): 1,
    }


def test_what_is_submitted_is_there_for_its_tenant_alone_and_after_a_restart(
    store: WorkStore, database: Database, path: Path
) -> None:
    order = new("a", subject="adapters/x")
    work = store.submit(order, 10)
    assert (work.state, work.token, work.revision, work.held_dataset) == (State.QUEUED, 0, 1, True)
    assert (work.ref, work.order, work.needs) == (order.ref, "{}", order.needs)
    database.close()
    again = Database(path, [work_store.SCHEMA, requests.SCHEMA])
    assert work_store.SqlWorkStore(again).get(order.ref) == work
    again.close()
    with pytest.raises(NotFound):
        store.get(dataclasses.replace(order.ref, tenant="other"))
    with pytest.raises(NotFound):
        store.get(dataclasses.replace(order.ref, kind=WorkKind.EXPORT))


def test_names_are_unique_and_queues_bounded_by_tenant_and_kind(store: WorkStore) -> None:
    store.submit(new("a"), 1)
    with pytest.raises(AlreadyExists):
        store.submit(new("a"), 9)
    with pytest.raises(ResourceExhausted) as raised:
        store.submit(new("b"), 1)
    assert raised.value.retry_after_s
    store.submit(new("a", tenant="other"), 1)
    store.submit(new("a", kind=WorkKind.EVALUATION), 1)


def test_all_tenants_together_have_a_bound_that_planned_work_passes(database: Database) -> None:
    store = work_store.SqlWorkStore(database, max_queued_in_all=2)
    store.submit(new("a"), 9)
    running = store.submit(new("a", tenant="other", kind=WorkKind.EVALUATION), 9)
    with pytest.raises(ResourceExhausted, match="2 are queued, the limit of all tenants is 2") as raised:
        store.submit(new("a", tenant="third"), 9)
    assert (raised.value.reason, raised.value.metadata["limit"]) == ("QUEUE_FULL", "2")
    store.submit(new("planned", tenant="third"), None)
    store.lease(running, "w", 0)  # what runs does not wait
    with pytest.raises(ResourceExhausted):
        store.submit(new("b", tenant="third"), 9)
    store.lease(store.get(new("planned", tenant="third").ref), "w", 0)
    store.submit(new("b", tenant="third"), 9)


def test_of_many_who_lease_at_once_one_gets_it_and_tokens_grow_over_all_work(store: WorkStore) -> None:
    work = store.submit(new("a"), 10)

    def lease(index: int) -> int:
        try:
            return store.lease(work, f"w{index}", 0).token
        except Aborted:
            return 0

    with ThreadPoolExecutor(8) as pool:
        tokens = [token for token in pool.map(lease, range(16)) if token]
    assert len(tokens) == 1
    assert store.lease(store.submit(new("b"), 10), "w", 0).token > tokens[0]
    assert len(store.attempts(work.uid)) == 1


def test_a_change_decided_on_what_is_past_is_refused(store: WorkStore) -> None:
    old = store.submit(new("a"), 10)
    now = store.lease(old, "w", 0)
    for act in (
        lambda: store.move(old, State.CANCELLED),
        lambda: store.change(old, progress="x"),
        lambda: store.lease(old, "w", 0),
        lambda: store.move(dataclasses.replace(now, token=now.token + 1), State.RUNNING),
    ):
        with pytest.raises(Aborted) as raised:
            act()
        assert raised.value.reason == "STATE_CHANGED"
    assert store.get(old.ref) == now
    running = store.move(now, State.RUNNING)
    with pytest.raises(Aborted, match="changed meanwhile"):
        store.move(now, State.FAILED)  # the same token, another state
    assert store.get(old.ref) == running


def test_the_table_of_transitions_is_asked(store: WorkStore) -> None:
    with pytest.raises(FailedPrecondition, match="is QUEUED and cannot become SUCCEEDED"):
        store.move(store.submit(new("a"), 10), State.SUCCEEDED)


def test_a_token_is_good_while_its_attempt_lives(store: WorkStore) -> None:
    work = leased(store)
    assert store.fenced("trainingJobs/a", work.token) == work
    assert store.beat("trainingJobs/a", work.token, step=3, progress="p").step == 3
    assert store.beat("trainingJobs/a", work.token).beats == 2
    for name, token in (("trainingJobs/b", work.token), ("trainingJobs/a", work.token + 1), ("trainingJobs/a", 0)):
        with pytest.raises(Aborted) as raised:
            store.fenced(name, token)
        assert raised.value.reason == "STALE_TOKEN"
    queued = store.move(store.get(work.ref), State.QUEUED)
    with pytest.raises(Aborted):
        store.beat("trainingJobs/a", work.token)
    store.lease(queued, "w", 0)
    with pytest.raises(Aborted):
        store.fenced("trainingJobs/a", work.token)


def test_an_attempts_end_keeps_step_and_failure(store: WorkStore) -> None:
    work = leased(store)
    store.beat("trainingJobs/a", work.token, step=5)
    assert store.attempts(work.uid)[0].last_step == 5
    failure = Failure("LEASE_LOST", "silent", transient=True)
    queued = store.move(store.get(work.ref), State.QUEUED, failure=failure, deaths=1)
    (attempt,) = store.attempts(work.uid)
    assert (attempt.number, attempt.last_step, attempt.failure) == (1, 5, failure)
    assert attempt.ended_s is not None
    assert (queued.failure, queued.deaths) == (failure, 1)
    again = store.lease(queued, "w2", 4)
    assert (again.failure, again.step) == (None, 4)
    assert [(each.number, each.resumed_step) for each in store.attempts(work.uid)] == [(1, 0), (2, 4)]
    assert [each.number for each in store.attempts(work.uid, limit=1)] == [2]


def test_a_further_checkpoint_forgives_deaths_and_an_undone_one_is_not_noted(store: WorkStore) -> None:
    work = leased(store)
    store.change(work, deaths=2)
    with pytest.raises(OSError, match="rename"), store.checkpointing("trainingJobs/a", work.token, 5):
        raise OSError("rename")
    assert (store.get(work.ref).checkpoint_step, store.get(work.ref).deaths) == (0, 2)
    with store.checkpointing("trainingJobs/a", work.token, 5):
        pass
    stored = store.change(store.get(work.ref), deaths=1)
    assert stored.checkpoint_step == 5
    with store.checkpointing("trainingJobs/a", work.token, 5):
        pass
    assert store.get(work.ref).deaths == 1
    with pytest.raises(Aborted), store.checkpointing("trainingJobs/a", work.token + 1, 6):
        pytest.fail("the token is stale")


def test_pages_go_from_new_to_old_and_filter(store: WorkStore) -> None:
    works = [store.submit(new(f"w{index}", subject=f"s{index % 2}"), 99) for index in range(5)]
    store.submit(new("x", tenant="other"), 99)
    store.move(works[0], State.CANCELLED)
    first = store.page("acme", WorkKind.TRAINING, None, 2)
    rest = store.page("acme", WorkKind.TRAINING, (first[-1].created_s, first[-1].uid), 9)
    assert [work.uid for work in first + rest] == [work.uid for work in reversed(works)]
    assert [work.ref.id for work in store.page("acme", WorkKind.TRAINING, None, 9, [State.CANCELLED])] == ["w0"]
    assert len(store.page("acme", WorkKind.TRAINING, None, 9, subject="s1")) == 2


def test_waiting_work_knows_its_place(store: WorkStore) -> None:
    works = [store.submit(new(f"w{index}"), 99) for index in range(3)]
    store.submit(new("x", tenant="other"), 99)
    assert [store.queue_position(work) for work in works] == [0, 1, 2]
    assert {work.uid for work in store.in_states([State.QUEUED], "acme")} == {work.uid for work in works}
    assert not store.in_states(HELD)


def test_only_finished_work_is_deleted_with_its_attempts(store: WorkStore) -> None:
    work = leased(store)
    with pytest.raises(Aborted):
        store.delete(work)
    failed = store.move(work, State.FAILED)
    assert store.with_holds() == [failed]
    store.delete(failed)
    assert store.find(work.uid) is None
    assert not store.attempts(work.uid)


def run_and_fail(store: WorkStore, work: Work) -> None:
    with store.together():
        store.move(store.get(work.ref), State.RUNNING)
        store.get(dataclasses.replace(work.ref, id="none"))


def test_changes_are_told_once_they_are_durable_and_undone_ones_never(store: WorkStore, changed: list[str]) -> None:
    work = store.submit(new("a"), 10)
    with store.together():
        store.lease(work, "w", 0)
        told = list(changed)
    assert (told, changed) == ([work.uid], [work.uid] * 2)
    with pytest.raises(NotFound):
        run_and_fail(store, work)
    assert store.get(work.ref).state is State.LEASED
    assert len(changed) == 2


def test_an_act_and_its_record_commit_together_and_once(store: WorkStore, database: Database) -> None:
    once = requests.SqlRequests(database)
    key = RequestKey("acme", "Create", str(uuid.uuid4()))

    def act() -> bytes:
        return store.submit(new(f"w{uuid.uuid4().hex[:8]}"), 99).uid.encode()

    def fail() -> bytes:
        act()
        raise FailedPrecondition("NO_LUCK", "after the submit")

    with pytest.raises(FailedPrecondition):
        once.once(key, b"body", fail)
    assert not store.in_states([State.QUEUED])
    assert once.find(key, b"body") is None
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: once.once(key, b"body", act), range(32)))
    assert len(made) == 1
    assert len(store.in_states([State.QUEUED])) == 1
    assert once.find(key, b"body") == made.pop()
    with pytest.raises(AlreadyExists):
        once.find(key, b"another")


def test_a_database_grows_step_by_step_and_refuses_to_go_back(path: Path) -> None:
    first = Schema("x", (("CREATE TABLE x (a TEXT)", "INSERT INTO x VALUES ('kept')"),))
    second = Schema("x", (*first.steps, ("ALTER TABLE x ADD COLUMN b TEXT NOT NULL DEFAULT 'new'",)))
    for schema in (first, first, second):
        opened = Database(path, [schema])
        with opened.read() as connection:
            rows = connection.execute(opened.table("x").select()).all()
        opened.close()
    assert [tuple(row) for row in rows] == [("kept", "new")]
    with pytest.raises(ValueError, match="x is at schema 2, this code knows 1"):
        Database(path, [first])


def test_foreign_keys_hold(database: Database) -> None:
    attempts = database.table("attempts")
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(
            attempts.insert().values(
                token=1, uid="none", number=1, worker="w", started_s=0.0, resumed_step=0, last_step=0, failure=""
            )
        )
