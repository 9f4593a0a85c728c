"""The ServingStore in SQL: counts of a canary and of what it is compared with."""

from __future__ import annotations

from sqlalchemy import delete, insert, select

from veneer_trainer.adapters.database import Database, Schema
from veneer_trainer.domain.adapters import Adapter
from veneer_trainer.domain.serving import ServingFigures

SCHEMA = Schema(
    "serving",
    (
        (
            """CREATE TABLE serving_figures (
                adapter TEXT NOT NULL REFERENCES adapters (uid) ON DELETE CASCADE, number BIGINT NOT NULL,
                since BIGINT NOT NULL, answered BIGINT NOT NULL, failed BIGINT NOT NULL,
                latency_p95_ms DOUBLE PRECISION NOT NULL, PRIMARY KEY (adapter, number))""",
        ),
    ),
)


class SqlServing:
    """See `registry_ports.ServingStore`; `database` has SCHEMA and the registry's."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._table = database.table("serving_figures")

    def count(self, adapter: Adapter, since: int, version: int, figures: ServingFigures) -> None:
        """See ServingStore."""
        columns = self._table.c
        with self._database.write() as connection:
            total = self.figures(adapter, since).get(version, ServingFigures()) + figures
            old = (columns.since != since) | (columns.number == version)
            connection.execute(delete(self._table).where(columns.adapter == adapter.uid, old))
            connection.execute(
                insert(self._table).values(
                    adapter=adapter.uid, number=version, since=since, answered=total.answered, failed=total.failed,
                    latency_p95_ms=total.latency_p95_ms,
                )
            )  # fmt: skip

    def figures(self, adapter: Adapter, since: int) -> dict[int, ServingFigures]:
        """See ServingStore."""
        columns = self._table.c
        query = select(self._table).where(columns.adapter == adapter.uid, columns.since == since)
        with self._database.read() as connection:
            return {
                row.number: ServingFigures(row.answered, row.failed, row.latency_p95_ms)
                for row in connection.execute(query)
            }
