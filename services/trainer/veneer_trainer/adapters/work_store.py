"""Queued work in the database: durable orders, states by compare-and-set, fencing tokens.

Every change of a state goes through `move`, which asks the table of `domain.lifecycle` and then compares
state and token in the same transaction as it writes. Tokens are minted here, one sequence for all work, so a
token alone says which attempt is meant, whoever's work it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Unpack

import msgspec
from sqlalchemy import ColumnElement, Row, and_, func, insert, or_, select, update

from veneer_rpc.errors import AlreadyExists, NotFound, ResourceExhausted
from veneer_trainer.adapters.database import Database, Schema
from veneer_trainer.domain.lifecycle import TERMINAL, State, check_transition
from veneer_trainer.domain.spec import Priority
from veneer_trainer.domain.work import (
    Attempt,
    Changes,
    Failure,
    Needs,
    NewWork,
    Work,
    WorkKind,
    WorkRef,
    lost_race,
    stale_token,
)

SCHEMA = Schema(
    "work",
    (
        (
            """CREATE TABLE work (
                uid TEXT PRIMARY KEY, tenant TEXT NOT NULL, kind TEXT NOT NULL, id TEXT NOT NULL,
                work_order TEXT NOT NULL, subject TEXT NOT NULL, priority TEXT NOT NULL,
                model_digest TEXT NOT NULL, dtype TEXT NOT NULL, memory_bytes BIGINT NOT NULL,
                dataset_version TEXT NOT NULL, held_dataset BOOLEAN NOT NULL,
                state TEXT NOT NULL, token BIGINT NOT NULL, beats BIGINT NOT NULL, step BIGINT NOT NULL,
                deaths INTEGER NOT NULL, retries INTEGER NOT NULL, delay_s DOUBLE PRECISION NOT NULL,
                outcome TEXT NOT NULL, progress TEXT NOT NULL, failure TEXT NOT NULL,
                checkpoint_step BIGINT NOT NULL, checkpoint_s DOUBLE PRECISION, revision BIGINT NOT NULL,
                created_s DOUBLE PRECISION NOT NULL, queued_s DOUBLE PRECISION NOT NULL,
                started_s DOUBLE PRECISION, ended_s DOUBLE PRECISION, updated_s DOUBLE PRECISION NOT NULL,
                UNIQUE (tenant, kind, id))""",
            "CREATE INDEX work_by_state ON work (state, queued_s)",
            "CREATE INDEX work_by_age ON work (tenant, kind, created_s, uid)",
            """CREATE TABLE attempts (
                token BIGINT PRIMARY KEY, uid TEXT NOT NULL REFERENCES work (uid) ON DELETE CASCADE,
                number INTEGER NOT NULL, worker TEXT NOT NULL, started_s DOUBLE PRECISION NOT NULL,
                ended_s DOUBLE PRECISION, resumed_step BIGINT NOT NULL, last_step BIGINT NOT NULL,
                failure TEXT NOT NULL)""",
            "CREATE INDEX attempts_of_work ON attempts (uid, number)",
            "CREATE TABLE last_token (value BIGINT NOT NULL)",
            "INSERT INTO last_token VALUES (0)",
        ),
        ("ALTER TABLE work ADD COLUMN shares TEXT NOT NULL DEFAULT ''",),
    ),
)

_FULL_RETRY_S = 10.0


def _full(text: str, limit: int) -> ResourceExhausted:
    """The refusal of work that would wait beside too much other."""
    return ResourceExhausted(
        "QUEUE_FULL", f"{text} {limit}", metadata={"limit": str(limit)}, retry_after_s=_FULL_RETRY_S
    )


class SqlWorkStore:
    """The WorkStore of one database; see `ports.WorkStore` for what each method promises.

    Args:
        database: where SCHEMA is.
        on_change: called with the work's uid after each change is durable.
        clock: seconds since 1970, for people; nothing is decided by it.
        max_queued_in_all: work of all kinds and tenants that may wait.
    """

    def __init__(
        self,
        database: Database,
        on_change: Callable[[str], None] = lambda uid: None,
        clock: Callable[[], float] = time.time,
        max_queued_in_all: int = sys.maxsize,
    ) -> None:
        self._database = database
        self._max_queued_in_all = max_queued_in_all
        self._on_change = on_change
        self._clock = clock
        self._work = database.table("work")
        self._attempts = database.table("attempts")
        self._last_token = database.table("last_token")

    def submit(self, new: NewWork, max_queued: int | None) -> Work:
        """See WorkStore."""
        columns, now_s = self._work.c, self._clock()
        mine = and_(columns.tenant == new.ref.tenant, columns.kind == new.ref.kind.value)
        with self._database.write() as connection:
            if connection.scalar(select(columns.uid).where(mine, columns.id == new.ref.id)) is not None:
                raise AlreadyExists("NAME_TAKEN", f"{new.ref.name} exists", resource=new.ref.name)
            if max_queued is not None:
                waiting = select(func.count()).where(columns.state == State.QUEUED.value)
                queued = connection.scalar(waiting.where(mine)) or 0
                if queued >= max_queued:
                    raise _full(f"{queued} of {new.ref.kind.value} are queued, the limit of a tenant is", max_queued)
                in_all = connection.scalar(waiting) or 0
                if in_all >= self._max_queued_in_all:
                    raise _full(f"{in_all} are queued, the limit of all tenants is", self._max_queued_in_all)
            values: dict[str, Any] = {
                "uid": new.uid, "tenant": new.ref.tenant, "kind": new.ref.kind.value, "id": new.ref.id,
                "work_order": new.order, "subject": new.subject, "priority": new.priority.value,
                "model_digest": new.needs.model_digest, "dtype": new.needs.dtype,
                "memory_bytes": new.needs.memory_bytes, "shares": new.needs.shares,
                "dataset_version": new.dataset_version,
                "held_dataset": bool(new.dataset_version), "state": State.QUEUED.value,
                "outcome": "", "progress": "", "failure": "", "revision": 1, "delay_s": 0.0,
                "created_s": now_s, "queued_s": now_s, "updated_s": now_s,
            }  # fmt: skip
            zeros = ("token", "beats", "step", "deaths", "retries", "checkpoint_step")
            connection.execute(insert(self._work).values(values | dict.fromkeys(zeros, 0)))
            return self._changed(new.uid)

    def get(self, ref: WorkRef) -> Work:
        """See WorkStore."""
        columns = self._work.c
        found = self._select(columns.tenant == ref.tenant, columns.kind == ref.kind.value, columns.id == ref.id)
        if not found:
            raise NotFound("WORK_UNKNOWN", f"there is no {ref.name}", resource=ref.name)
        return found[0]

    def find(self, uid: str) -> Work | None:
        """See WorkStore."""
        return next(iter(self._select(self._work.c.uid == uid)), None)

    def page(
        self,
        tenant: str,
        kind: WorkKind,
        after: tuple[float, str] | None,
        limit: int,
        states: Collection[State] = (),
        subject: str = "",
    ) -> list[Work]:
        """See WorkStore."""
        columns = self._work.c
        wanted: list[ColumnElement[bool]] = [columns.tenant == tenant, columns.kind == kind.value]
        if states:
            wanted.append(columns.state.in_([state.value for state in states]))
        if subject:
            wanted.append(columns.subject == subject)
        if after is not None:
            created_s, uid = after
            older = and_(columns.created_s == created_s, columns.uid < uid)
            wanted.append(or_(columns.created_s < created_s, older))
        return self._select(*wanted, order=(columns.created_s.desc(), columns.uid.desc()), limit=limit)

    def in_states(self, states: Iterable[State], tenant: str = "") -> list[Work]:
        """See WorkStore."""
        wanted: list[ColumnElement[bool]] = [self._work.c.state.in_([state.value for state in states])]
        if tenant:
            wanted.append(self._work.c.tenant == tenant)
        return self._select(*wanted, order=(self._work.c.queued_s, self._work.c.uid))

    def counts(self) -> dict[tuple[WorkKind, State], int]:
        """See WorkStore."""
        columns = self._work.c
        query = select(columns.kind, columns.state, func.count()).group_by(columns.kind, columns.state)
        with self._database.read() as connection:
            return {(WorkKind(kind), State(state)): count for kind, state, count in connection.execute(query)}

    def with_holds(self) -> list[Work]:
        """See WorkStore."""
        return self._select(self._work.c.held_dataset)

    def queue_position(self, work: Work) -> int:
        """See WorkStore."""
        columns = self._work.c
        earlier = or_(
            columns.queued_s < work.queued_s,
            and_(columns.queued_s == work.queued_s, columns.uid < work.uid),
        )
        same = (
            columns.tenant == work.ref.tenant,
            columns.kind == work.ref.kind.value,
            columns.priority == work.priority.value,
            columns.state == State.QUEUED.value,
        )
        with self._database.read() as connection:
            return connection.scalar(select(func.count()).where(*same, earlier)) or 0

    def attempts(self, uid: str, limit: int = 100) -> list[Attempt]:
        """See WorkStore."""
        columns = self._attempts.c
        newest = select(self._attempts).where(columns.uid == uid).order_by(columns.number.desc()).limit(limit)
        with self._database.read() as connection:
            rows = list(connection.execute(newest))
            columns = self._work.c
            current = connection.execute(select(columns.token, columns.step).where(columns.uid == uid)).first()
        token, step = current or (0, 0)
        return [
            Attempt(
                row.number, row.token, row.worker, row.started_s, row.ended_s, row.resumed_step,
                step if row.token == token else row.last_step, _failure(row.failure),
            )
            for row in reversed(rows)
        ]  # fmt: skip

    def lease(self, work: Work, worker: str, resumed_step: int) -> Work:
        """See WorkStore."""
        with self._database.write() as connection:
            connection.execute(update(self._last_token).values(value=self._last_token.c.value + 1))
            token = connection.scalar(select(self._last_token.c.value))
            number = connection.scalar(select(func.count()).where(self._attempts.c.uid == work.uid))
            self._swap(work, State.LEASED, token=token, step=resumed_step, failure="")
            connection.execute(
                insert(self._attempts).values(
                    token=token, uid=work.uid, number=(number or 0) + 1, worker=worker,
                    started_s=self._clock(), resumed_step=resumed_step, last_step=resumed_step, failure="",
                )
            )  # fmt: skip
            return self._changed(work.uid)

    def move(self, work: Work, then: State, **changes: Unpack[Changes]) -> Work:
        """See WorkStore."""
        with self._database.write() as connection:
            self._swap(work, then, **_columns(changes))
            if work.state.held and not then.held:
                last_step = changes.get("step", work.step)
                ended = update(self._attempts).where(self._attempts.c.token == work.token)
                failure = _encoded(changes.get("failure"))
                connection.execute(ended.values(ended_s=self._clock(), last_step=last_step, failure=failure))
            return self._changed(work.uid)

    def fenced(self, name: str, token: int) -> Work:
        """See WorkStore."""
        found = self._select(self._work.c.token == token) if token > 0 else []
        if not found or not found[0].state.held or found[0].ref.name != name:
            raise stale_token(name, token)
        return found[0]

    def beat(self, name: str, token: int, **changes: Unpack[Changes]) -> Work:
        """See WorkStore."""
        with self._database.write() as connection:
            work = self.fenced(name, token)
            beat = update(self._work).where(self._work.c.uid == work.uid)
            connection.execute(beat.values(beats=self._work.c.beats + 1))
            return self.change(work, **changes) if changes else self._one(work.uid)

    def change(self, work: Work, **changes: Unpack[Changes]) -> Work:
        """See WorkStore."""
        with self._database.write():
            self._swap(work, work.state, checked=True, **_columns(changes))
            return self._changed(work.uid)

    @contextmanager
    def checkpointing(self, name: str, token: int, step: int) -> Iterator[None]:
        """See WorkStore."""
        with self._database.write():
            work = self.fenced(name, token)
            deaths = 0 if step > work.checkpoint_step else work.deaths
            stored = {"checkpoint_step": step, "checkpoint_s": self._clock(), "deaths": deaths}
            self._swap(work, work.state, checked=True, **stored)
            self._changed(work.uid)
            yield

    def together(self) -> AbstractContextManager[Any]:
        """See WorkStore."""
        return self._database.write()

    def delete(self, work: Work) -> None:
        """See WorkStore."""
        columns = self._work.c
        finished = columns.state.in_([state.value for state in TERMINAL])
        with self._database.write() as connection:
            gone = connection.execute(self._work.delete().where(columns.uid == work.uid, finished))
            if gone.rowcount != 1:
                raise lost_race(work.ref.name)
            self._database.after_commit(lambda: self._on_change(work.uid))

    def _swap(self, work: Work, then: State, checked: bool = False, **values: Any) -> None:  # noqa: ANN401  # columns
        """Compare-and-set on (state, token); `checked` where the state stays."""
        if not checked:
            check_transition(work.ref.name, work.state, then)
        columns, now_s = self._work.c, self._clock()
        values |= {"state": then.value, "revision": columns.revision + 1, "updated_s": now_s}
        if then is State.QUEUED and work.state is not State.QUEUED:
            values["queued_s"] = now_s
            values["ended_s"] = None
        if then is State.RUNNING and work.started_s is None:
            values["started_s"] = now_s
        if then.terminal:
            values["ended_s"] = now_s
        unchanged = (columns.uid == work.uid, columns.state == work.state.value, columns.token == work.token)
        with self._database.write() as connection:
            if connection.execute(update(self._work).where(*unchanged).values(values)).rowcount != 1:
                raise lost_race(work.ref.name)

    def _changed(self, uid: str) -> Work:
        self._database.after_commit(lambda: self._on_change(uid))
        return self._one(uid)

    def _one(self, uid: str) -> Work:
        return self._select(self._work.c.uid == uid)[0]

    def _select(
        self, *wanted: ColumnElement[bool], order: tuple[Any, ...] = (), limit: int | None = None
    ) -> list[Work]:
        query = select(self._work).where(*wanted).order_by(*order).limit(limit)
        with self._database.read() as connection:
            return [_work(row) for row in connection.execute(query)]


def _work(row: Row[Any]) -> Work:
    columns = row._asdict()
    needs = Needs(*map(columns.pop, ("model_digest", "dtype", "memory_bytes", "shares")))
    ref = WorkRef(columns.pop("tenant"), WorkKind(columns.pop("kind")), columns.pop("id"))
    return Work(
        ref=ref,
        order=columns.pop("work_order"),
        priority=Priority(columns.pop("priority")),
        needs=needs,
        state=State(columns.pop("state")),
        failure=_failure(columns.pop("failure")),
        **columns,
    )


def _columns(changes: Changes) -> dict[str, Any]:
    values: dict[str, Any] = dict(changes)
    if "failure" in changes:
        values["failure"] = _encoded(changes["failure"])
    return values


def _encoded(failure: Failure | None) -> str:
    return msgspec.json.encode(failure).decode() if failure else ""


def _failure(text: str) -> Failure | None:
    return msgspec.json.decode(text, type=Failure) if text else None
