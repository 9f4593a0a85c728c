"""The EvaluationStore in SQL. Samples and figures go with the work that they belong to."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
from sqlalchemy import and_, delete, func, insert, or_, select

from veneer_trainer.adapters.database import Database, Schema
from veneer_trainer.domain.evaluations import EvaluationFigures, Judgement, Metric, Sample

SCHEMA = Schema(
    "evaluations",
    (
        (
            """CREATE TABLE evaluation_samples (
                work TEXT NOT NULL REFERENCES work (uid) ON DELETE CASCADE, position BIGINT NOT NULL,
                hit BOOLEAN NOT NULL, body TEXT NOT NULL, PRIMARY KEY (work, position))""",
            """CREATE TABLE evaluation_figures (
                work TEXT PRIMARY KEY REFERENCES work (uid) ON DELETE CASCADE,
                metrics TEXT NOT NULL, answered BIGINT NOT NULL, total BIGINT NOT NULL)""",
            """CREATE TABLE judgements (
                uid TEXT PRIMARY KEY, tenant TEXT NOT NULL, subject TEXT NOT NULL, other_subject TEXT NOT NULL,
                body TEXT NOT NULL, created_s DOUBLE PRECISION NOT NULL)""",
            "CREATE INDEX judgements_by_age ON judgements (tenant, created_s, uid)",
        ),
    ),
)


class SqlEvaluations:
    """See `evaluation_ports.EvaluationStore`.

    Args:
        database: where SCHEMA is, and the work's.
        clock: seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._samples = database.table("evaluation_samples")
        self._figures = database.table("evaluation_figures")
        self._judgements = database.table("judgements")

    def put(
        self, uid: str, samples: Sequence[Sample], metrics: Sequence[Metric] | None, total: int
    ) -> EvaluationFigures:
        """See EvaluationStore."""
        columns = self._samples.c
        by_index = {sample.index: sample for sample in samples}
        with self._database.write() as connection:
            kept = self.figures(uid).metrics if metrics is None else tuple(metrics)
            connection.execute(delete(self._samples).where(columns.work == uid, columns.position.in_(by_index)))
            rows = [
                {"work": uid, "position": index, "hit": sample.hit, "body": msgspec.json.encode(sample).decode()}
                for index, sample in by_index.items()
            ]
            if rows:
                connection.execute(insert(self._samples), rows)
            answered = connection.scalar(select(func.count()).where(columns.work == uid)) or 0
            connection.execute(delete(self._figures).where(self._figures.c.work == uid))
            text = msgspec.json.encode(kept).decode()
            connection.execute(insert(self._figures).values(work=uid, metrics=text, answered=answered, total=total))
            return EvaluationFigures(kept, answered, total)

    def figures(self, uid: str) -> EvaluationFigures:
        """See EvaluationStore."""
        with self._database.read() as connection:
            row = connection.execute(select(self._figures).where(self._figures.c.work == uid)).first()
        if row is None:
            return EvaluationFigures()
        return EvaluationFigures(msgspec.json.decode(row.metrics, type=tuple[Metric, ...]), row.answered, row.total)

    def samples(self, uid: str, after: int, limit: int, only_misses: bool) -> list[Sample]:
        """See EvaluationStore."""
        columns = self._samples.c
        wanted = [columns.work == uid, columns.position > after, *([~columns.hit] if only_misses else [])]
        query = select(columns.body).where(*wanted).order_by(columns.position).limit(limit)
        with self._database.read() as connection:
            return [msgspec.json.decode(body, type=Sample) for body in connection.scalars(query)]

    def judge(self, tenant: str, judgement: Judgement) -> Judgement:
        """See EvaluationStore."""
        made = replace(judgement, uid=str(uuid.uuid4()), created_s=self._clock())
        with self._database.write() as connection:
            connection.execute(
                insert(self._judgements).values(
                    uid=made.uid, tenant=tenant, subject=made.subject, other_subject=made.other_subject,
                    body=msgspec.json.encode(made).decode(), created_s=made.created_s,
                )
            )  # fmt: skip
        return made

    def judgement(self, uid: str) -> Judgement:
        """See EvaluationStore."""
        query = select(self._judgements.c.body).where(self._judgements.c.uid == uid)
        with self._database.read() as connection:
            return msgspec.json.decode(connection.execute(query).scalar_one(), type=Judgement)

    def judgements(
        self, tenant: str, before: tuple[float, str] | None, limit: int, subject: str = ""
    ) -> list[Judgement]:
        """See EvaluationStore."""
        columns = self._judgements.c
        wanted = [columns.tenant == tenant]
        if subject:
            wanted.append(or_(columns.subject == subject, columns.other_subject == subject))
        if before is not None:
            created_s, uid = before
            older = and_(columns.created_s == created_s, columns.uid < uid)
            wanted.append(or_(columns.created_s < created_s, older))
        query = select(columns.body).where(*wanted).order_by(columns.created_s.desc(), columns.uid.desc())
        with self._database.read() as connection:
            return [msgspec.json.decode(body, type=Judgement) for body in connection.scalars(query.limit(limit))]
