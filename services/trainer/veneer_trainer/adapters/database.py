"""The trainer's database: one SQLite file, its transactions, and the versions of its schema.

Each store owns tables of its own and says how they came to be: a `Schema` with the ordered steps from nothing
to the present. Steps are SQL text and never change once released, so a database of any age reaches the same
form. Column types are those that PostgreSQL has too. What the tables mean is their stores' matter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, Table, create_engine, event

_BUSY_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of one store: a name that never changes, and steps, each some SQL statements."""

    name: str
    steps: tuple[tuple[str, ...], ...]


class Database:
    """Transactions over one SQLite file. Threads share it.

    Args:
        path: the file; made when missing.
        schemas: of every store, in an order in which foreign keys find their tables.

    Raises:
        ValueError: the file was written by a newer version of the code.
    """

    def __init__(self, path: Path, schemas: Sequence[Schema]) -> None:
        self._engine = _engine(path)
        self._writing = threading.RLock()  # a queue of our own threads, where SQLite would poll
        self._local = threading.local()
        with self.write() as connection:
            _migrate(connection, schemas)
        self._tables = MetaData()
        self._tables.reflect(self._engine)

    def table(self, name: str) -> Table:
        """Returns a table with the columns that the file has.

        Raises:
            KeyError: no schema makes such a table.
        """
        return self._tables.tables[name]

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yields a connection in a transaction that is durable when the block ends, and undone if it raises.

        Inside another `write` of the same thread it joins that one, so that several stores commit together.
        """
        outer: Connection | None = getattr(self._local, "connection", None)
        if outer is not None:
            yield outer
            return
        callbacks: list[Callable[[], None]] = []
        with self._writing, self._engine.connect() as connection:
            connection = connection.execution_options(begin="BEGIN IMMEDIATE")
            self._local.connection, self._local.callbacks = connection, callbacks
            try:
                with connection.begin():
                    yield connection
            finally:
                self._local.connection = None
        for callback in callbacks:
            callback()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yields a connection that sees one state of the database, that of the `write` or `read` it stands in."""
        outer: Connection | None = getattr(self._local, "connection", None) or getattr(self._local, "reading", None)
        if outer is not None:
            yield outer
            return
        with self._engine.connect() as connection, connection.begin():
            self._local.reading = connection
            try:
                yield connection
            finally:
                self._local.reading = None

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Calls back when the `write` that this stands in has become durable; never if it is undone."""
        self._local.callbacks.append(callback)

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": _BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: object) -> None:  # noqa: ANN401  # sqlite3's, untyped in the event
        connection.isolation_level = None  # the driver would begin on its own, and too late
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine


def _migrate(connection: Connection, schemas: Sequence[Schema]) -> None:
    run = connection.exec_driver_sql
    run("CREATE TABLE IF NOT EXISTS schema_versions (name TEXT PRIMARY KEY, version INTEGER NOT NULL)")
    for schema in schemas:
        row = run("SELECT version FROM schema_versions WHERE name = ?", (schema.name,)).first()
        done = row[0] if row else 0
        if done > len(schema.steps):
            raise ValueError(f"{schema.name} is at schema {done}, this code knows {len(schema.steps)}")
        for statement in (text for step in schema.steps[done:] for text in step):
            run(statement)
        run("INSERT OR REPLACE INTO schema_versions VALUES (?, ?)", (schema.name, len(schema.steps)))
