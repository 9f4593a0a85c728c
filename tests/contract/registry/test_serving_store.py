"""What a canary's counts promise, on a real database file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from veneer_rpc.names import AdapterName, ModelName
from veneer_trainer.adapters import registry_store, serving_store, work_store
from veneer_trainer.adapters.database import Database
from veneer_trainer.adapters.registry_store import SqlRegistry
from veneer_trainer.adapters.serving_store import SqlServing
from veneer_trainer.domain.adapters import Adapter, Settings
from veneer_trainer.domain.serving import ServingFigures

SCHEMAS = [work_store.SCHEMA, registry_store.SCHEMA, serving_store.SCHEMA]
FIGURES = ServingFigures(3, 1, 100.0)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "trainer.db", SCHEMAS)
    yield opened
    opened.close()


def adapter(database: Database, name: str) -> Adapter:
    return SqlRegistry(database).create("t", AdapterName(name), ModelName("m"), Settings())


def test_counts_add_up_by_version_and_outlast_the_process(database: Database, tmp_path: Path) -> None:
    mine, other = adapter(database, "a"), adapter(database, "b")
    store = SqlServing(database)
    store.count(mine, 5, 1, FIGURES)
    store.count(mine, 5, 2, FIGURES)
    store.count(mine, 5, 2, ServingFigures(1, 0, 500.0))
    store.count(other, 5, 2, FIGURES)
    again = Database(tmp_path / "trainer.db", SCHEMAS)
    assert SqlServing(again).figures(mine, 5) == {1: FIGURES, 2: ServingFigures(4, 1, 200.0)}
    again.close()


def test_what_was_counted_since_another_move_goes(database: Database) -> None:
    mine, other = adapter(database, "a"), adapter(database, "b")
    store = SqlServing(database)
    for each in (mine, other):
        store.count(each, 5, 1, FIGURES)
        store.count(each, 5, 2, FIGURES)
    assert store.figures(mine, 6) == {}
    store.count(mine, 6, 2, FIGURES)
    assert store.figures(mine, 6) == {2: FIGURES}
    assert store.figures(mine, 5) == {}
    assert len(store.figures(other, 5)) == 2


def test_a_deleted_adapter_takes_its_counts_along(database: Database) -> None:
    mine, store = adapter(database, "a"), SqlServing(database)
    store.count(mine, 1, 1, FIGURES)
    SqlRegistry(database).delete(mine)
    assert store.figures(mine, 1) == {}
