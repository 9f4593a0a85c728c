"""What the store of samples promises, on a real database file."""

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from veneer_trainer.adapters import evaluation_store, requests, work_store
from veneer_trainer.adapters.database import Database
from veneer_trainer.domain.evaluations import EvaluationFigures, Judgement, Metric, Sample
from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.work import Failure, NewWork, Work, WorkKind, WorkRef
from veneer_trainer.evaluation_ports import EvaluationStore

METRIC = Metric("exact_match", 0.5, 0.1, 0.9, 2)
SCHEMAS = [work_store.SCHEMA, requests.SCHEMA, evaluation_store.SCHEMA]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "trainer.db", SCHEMAS)
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> EvaluationStore:
    return evaluation_store.SqlEvaluations(database)


@pytest.fixture
def work(database: Database) -> Work:
    ref = WorkRef("acme", WorkKind.EVALUATION, "e")
    return work_store.SqlWorkStore(database).submit(NewWork(ref, str(uuid.uuid4()), "{}"), 10)


def sample(index: int, answer: str = "7") -> Sample:
    return Sample(index, "r" * 64, ("p" * 64,), "?", "7", answer, metrics=(METRIC,), latency_ms=1.5)


def test_samples_come_back_by_index_and_the_same_again_replaces_the_first(store: EvaluationStore, work: Work) -> None:
    assert store.figures(work.uid) == EvaluationFigures()
    assert store.put(work.uid, [sample(1), sample(0)], [METRIC], 3) == EvaluationFigures((METRIC,), 2, 3)
    assert store.put(work.uid, [sample(1, "1")], None, 3) == EvaluationFigures((METRIC,), 2, 3)  # figures stay
    assert store.put(work.uid, [sample(2)], (), 3) == EvaluationFigures((), 3, 3)
    assert store.samples(work.uid, -1, 2, False) == [sample(0), sample(1, "1")]
    assert store.samples(work.uid, 1, 2, False) == [sample(2)]
    assert store.samples(work.uid, -1, 9, True) == [sample(1, "1")]


def test_a_failed_sample_is_a_miss_whatever_it_says(store: EvaluationStore, work: Work) -> None:
    failed = dataclasses.replace(sample(0), failure=Failure("TIMEOUT", "no answer", True))
    store.put(work.uid, [failed], None, 1)
    assert store.samples(work.uid, -1, 9, True) == [failed]


def test_samples_go_with_their_work(store: EvaluationStore, work: Work, database: Database) -> None:
    store.put(work.uid, [sample(0)], [METRIC], 1)
    works = work_store.SqlWorkStore(database)
    works.delete(works.move(work, State.CANCELLED))
    assert store.samples(work.uid, -1, 9, False) == []
    assert store.figures(work.uid) == EvaluationFigures()


def test_verdicts_are_a_tenants_own_newest_first(store: EvaluationStore) -> None:
    first = store.judge("acme", Judgement("models/a", 1.0, "models/b", judge="me"))
    second = store.judge("acme", Judgement("models/c", 0.0))
    store.judge("other", Judgement("models/a", 0.5))
    assert store.judgements("acme", None, 9) == [second, first]
    assert store.judgements("acme", (second.created_s, second.uid), 9) == [first]
    assert store.judgements("acme", None, 9, "models/b") == [first]
    assert store.judgement(first.uid) == first
