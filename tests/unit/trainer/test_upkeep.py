import dataclasses
from pathlib import Path

from veneer_rpc.names import DatasetVersionName
from veneer_trainer.adapters import work_store
from veneer_trainer.adapters.database import Database
from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.upkeep import Upkeep
from veneer_trainer.domain.work import NewWork, WorkKind, WorkRef

VERSION = str(DatasetVersionName("d", "0" * 64))


class Datasets:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def hold(self, tenant: str, name: DatasetVersionName, holder: str) -> None:
        self.calls.append(("hold", holder))

    def release(self, tenant: str, name: DatasetVersionName, holder: str) -> None:
        self.calls.append(("release", holder))


class Checkpoints:
    def owners(self) -> list[str]:
        return []


def test_what_a_job_planned_holds_its_data_before_the_job_lets_go(tmp_path: Path) -> None:
    database = Database(tmp_path / "trainer.db", [work_store.SCHEMA])
    store, datasets = work_store.SqlWorkStore(database), Datasets()
    job = NewWork(WorkRef("acme", WorkKind.TRAINING, "j"), "1", "{}", dataset_version=VERSION)
    store.move(store.submit(job, 9), State.CANCELLED)
    planned = dataclasses.replace(job, ref=WorkRef("acme", WorkKind.EVALUATION, "e"), uid="2")
    store.submit(planned, 9)
    upkeep = Upkeep(store, datasets, Checkpoints())  # type: ignore[arg-type]  # the parts it uses here
    upkeep.holds()
    assert datasets.calls == [("hold", "evaluations/e"), ("release", "trainingJobs/j")]
    upkeep.holds()
    assert len(datasets.calls) == 2  # held already, released already
    database.close()
