"""What the registry promises, on a real database file and real folders."""

import dataclasses
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from veneer_rpc.errors import Aborted, AlreadyExists, DataLoss, FailedPrecondition, NotFound
from veneer_rpc.names import AdapterName, AdapterVersionName, DatasetVersionName, ModelName
from veneer_trainer.adapters import registry_store, requests, work_store
from veneer_trainer.adapters.adapter_files import AdapterFiles
from veneer_trainer.adapters.database import Database
from veneer_trainer.domain.adapters import Adapter, Inspected, Lineage, NewVersion, Settings, TrafficSplit
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Contract, Order, Outcome, Progress, TrainingJob
from veneer_trainer.domain.publishing import Publishing
from veneer_trainer.domain.spec import Lora, TrainingSpec
from veneer_trainer.domain.work import NewWork, Work, WorkKind, WorkRef
from veneer_trainer.ports import BaseModel, PublishHeader
from veneer_trainer.registry_ports import RegistryStore

A, B = AdapterName("a"), AdapterName("b")
MODEL = ModelName("m")
CONTRACT = Contract("c" * 64, "m", "t", "p", 1, 2, 16, 2, 2, "bicubic", (0.5,), (0.5,), "r", "k")
FILES = (StoredFile("adapter_config.json", "0" * 64, 2),)
CONTENT = Inspected("d" * 64, CONTRACT, Lora(), ("l.q_proj",), 10, FILES)
SPEC = TrainingSpec(MODEL, DatasetVersionName("d", "0" * 64), A)
SCHEMAS = [work_store.SCHEMA, requests.SCHEMA, registry_store.SCHEMA]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trainer.db"


@pytest.fixture
def changed() -> list[None]:
    return []


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = Database(path, SCHEMAS)
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database, changed: list[None]) -> RegistryStore:
    return registry_store.SqlRegistry(database, lambda: changed.append(None))


def new(job: str = "", digest: str = "d" * 64) -> NewVersion:
    lineage = Lineage(training_job="trainingJobs/j", spec=SPEC, code_version="1")
    return NewVersion(str(uuid.uuid4()), dataclasses.replace(CONTENT, digest=digest), lineage, None, job)


def with_versions(store: RegistryStore, count: int, tenant: str = "acme", name: AdapterName = A) -> Adapter:
    adapter = store.create(tenant, name, MODEL, Settings())
    for _ in range(count):
        store.add_version(store.get(tenant, name), new())
    return store.get(tenant, adapter.name)


def test_what_is_registered_is_there_for_its_tenant_alone_and_after_a_restart(
    store: RegistryStore, database: Database, path: Path
) -> None:
    store.create("acme", A, MODEL, Settings("name", {"k": "v"}, TrafficSplit("canary", 0.5), True))
    made = store.add_version(store.get("acme", A), new("job"))
    adapter = store.move(store.get("acme", A), "production", 1, "me", "why")
    version = store.version("acme", made.name)
    assert (version.content, version.lineage.spec, version.aliases) == (CONTENT, SPEC, ("production",))
    database.close()
    again = Database(path, SCHEMAS)
    reopened = registry_store.SqlRegistry(again)
    assert reopened.get("acme", A) == adapter
    assert reopened.version("acme", made.name) == version
    assert reopened.version_of_job("job") == version
    assert [(each.to_version, each.actor, each.reason) for each in reopened.moves(adapter, None, 9)] == [
        (1, "me", "why")
    ]
    assert reopened.find("other", A) is None
    for read in (lambda: reopened.get("other", A), lambda: reopened.version("other", made.name)):
        with pytest.raises(NotFound):
            read()
    assert reopened.page("other", "", 9) == []
    assert reopened.changes(0, "other").adapters == ()
    again.close()


def test_names_are_taken_once_per_tenant_and_numbers_never_given_twice(store: RegistryStore) -> None:
    adapter = with_versions(store, 2)
    with pytest.raises(AlreadyExists):
        store.create("acme", A, MODEL, Settings())
    assert store.create("other", A, MODEL, Settings()).latest_version == 0
    store.delete_version("acme", store.version("acme", AdapterVersionName("a", 2)))
    assert store.add_version(store.get("acme", A), new()).name.version == 3
    assert store.numbers(adapter) == {1, 3}
    assert len(store.delete(store.get("acme", A))) == 2
    assert with_versions(store, 1).latest_version == 4


def test_a_job_has_one_version_and_an_alias_points_at_one_that_is_there(store: RegistryStore) -> None:
    adapter = with_versions(store, 1)
    store.add_version(store.get("acme", A), new("job"))
    with pytest.raises(IntegrityError):
        store.add_version(store.get("acme", A), new("job"))
    assert store.get("acme", A).latest_version == 2  # the refused one took no number
    with pytest.raises(IntegrityError):
        store.move(adapter, "production", 9, "me", "")
    store.move(store.get("acme", A), "production", 2, "me", "")
    with pytest.raises(IntegrityError):
        store.delete_version("acme", store.version("acme", AdapterVersionName("a", 2)))


def test_every_change_takes_the_next_revision_and_watchers_hear_of_it_once_durable(
    store: RegistryStore, changed: list[None]
) -> None:
    with_versions(store, 1)
    before, heard = store.revision(), len(changed)

    def undone() -> None:
        with store.together():
            store.move(store.get("acme", A), "production", 1, "me", "")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        undone()
    assert (store.revision(), len(changed)) == (before, heard)
    store.move(store.get("acme", A), "production", 1, "me", "")
    assert store.revision() > before
    assert len(changed) > heard
    assert [each.alias for each in store.changes(before).adapters[0].aliases] == ["production"]
    assert store.changes(store.revision()).adapters == ()


def test_changes_are_by_tenant_and_base_and_a_deleted_adapter_is_among_them(store: RegistryStore) -> None:
    with_versions(store, 1)
    with_versions(store, 1, "other", B)
    store.create("acme", B, ModelName("n"), Settings())
    assert [(each.tenant, each.name) for each in store.changes(0).adapters] == [("acme", A), ("other", B), ("acme", B)]
    assert [each.name for each in store.changes(0, "acme").adapters] == [A, B]
    assert [each.name for each in store.changes(0, "", "models/n").adapters] == [B]
    before = store.revision()
    store.delete(store.get("acme", A))
    assert store.changes(before).deleted == (("acme", A),)
    assert store.changes(before, "other").deleted == ()
    store.create("acme", A, MODEL, Settings())
    after = store.changes(before)
    assert (after.deleted, [each.name for each in after.adapters]) == ((), [A])


def test_pages_yield_each_once(store: RegistryStore) -> None:
    for letter in "cab":
        store.create("acme", AdapterName(letter), MODEL, Settings())
    assert [each.name.adapter for each in store.page("acme", "", 2)] == ["a", "b"]
    assert [each.name.adapter for each in store.page("acme", "b", 2)] == ["c"]
    for number in range(1, 5):
        store.add_version(store.get("acme", A), new())
        store.move(store.get("acme", A), "production", number, "me", "")
    assert [each.name.version for each in store.versions("acme", A, None, 3)] == [4, 3, 2]
    assert [each.name.version for each in store.versions("acme", A, 2, 3)] == [1]
    adapter = store.get("acme", A)
    assert [each.sequence for each in store.moves(adapter, None, 3)] == [4, 3, 2]
    assert [each.sequence for each in store.moves(adapter, 2, 3)] == [1]
    assert [each.to_version for each in store.moves_of(adapter, "production")] == [1, 2, 3, 4]


def test_many_at_once_get_numbers_without_gaps(store: RegistryStore) -> None:
    store.create("acme", A, MODEL, Settings())

    def add(_: int) -> int:
        with store.together():
            return store.add_version(store.get("acme", A), new()).name.version

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(add, range(32))) == list(range(1, 33))


def test_an_alias_is_never_seen_with_the_digest_of_another_version(store: RegistryStore) -> None:
    store.create("acme", A, MODEL, Settings())
    for number in (1, 2):
        store.add_version(store.get("acme", A), new(digest=str(number) * 64))
    store.move(store.get("acme", A), "production", 1, "me", "")

    def flip() -> None:
        for turn in range(100):
            store.move(store.get("acme", A), "production", 1 + turn % 2, "me", "")

    with ThreadPoolExecutor(1) as pool:
        flipping = pool.submit(flip)
        while not flipping.done():
            (alias,) = store.changes(0).adapters[0].aliases
            assert alias.digest == str(alias.version.version) * 64
        flipping.result()


# What publishing promises, over the same store and real folders.


class Folders(AdapterFiles):
    """Real folders whose files are taken as they are."""

    def inspect(self, folder: Path, base: BaseModel, contract: Contract) -> Inspected:
        return CONTENT


class Catalog:
    def get(self, name: ModelName) -> BaseModel:
        return BaseModel(MODEL, "m", 1024, 10_000, {})

    def contract(self, name: ModelName, max_pixels: int) -> Contract:
        return CONTRACT


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def publishing(store: RegistryStore, database: Database, root: Path) -> Publishing:
    return Publishing(store, Folders(root), Catalog(), requests.SqlRequests(database))


def received(tmp_path: Path) -> Path:
    folder = tmp_path / f"incoming-{uuid.uuid4()}"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b"{}")
    return folder


@pytest.fixture
def work(database: Database) -> Work:
    ref = WorkRef("acme", WorkKind.TRAINING, "j")
    return work_store.SqlWorkStore(database).submit(NewWork(ref, str(uuid.uuid4()), "{}"), 10)


def job(work: Work, **spec: object) -> TrainingJob:
    return TrainingJob(work, Order(dataclasses.replace(SPEC, **spec), ""), Outcome(), None)


HEADER = PublishHeader(CONTENT.digest, FILES, Progress(1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0))


def publish(publishing: Publishing, tmp_path: Path, job: TrainingJob, header: PublishHeader = HEADER) -> int:
    return publishing.publish("acme", job, header, received(tmp_path), lambda: None).name.version


def test_a_job_publishes_once_and_its_first_version_is_in_production(
    publishing: Publishing, store: RegistryStore, tmp_path: Path, root: Path, work: Work
) -> None:
    assert publish(publishing, tmp_path, job(work)) == 1
    assert publish(publishing, tmp_path, job(work)) == 1
    assert len(list(root.iterdir())) == 1
    assert publish(publishing, tmp_path, job(dataclasses.replace(work, uid="other"))) == 2
    assert store.get("acme", A).aliases == {"production": 1}
    version = store.version("acme", AdapterVersionName("a", 1))
    assert (root / version.uid / "adapter_config.json").read_bytes() == b"{}"


def test_a_token_that_goes_stale_while_files_move_leaves_nothing(
    publishing: Publishing, store: RegistryStore, tmp_path: Path, root: Path, work: Work
) -> None:
    asked = []

    def fence() -> None:
        asked.append(None)
        if len(asked) > 1:
            raise Aborted("STALE_TOKEN", "another attempt came after")

    with pytest.raises(Aborted):
        publishing.publish("acme", job(work), HEADER, received(tmp_path), fence)
    assert not list(root.iterdir())
    assert store.find("acme", A) is None
    assert store.revision() == 0


def test_what_was_not_announced_or_does_not_fit_is_refused(
    publishing: Publishing, store: RegistryStore, tmp_path: Path, root: Path, work: Work
) -> None:
    with pytest.raises(DataLoss):
        publish(publishing, tmp_path, job(work), dataclasses.replace(HEADER, digest="e" * 64))
    with pytest.raises(FailedPrecondition, match="asked for"):
        publish(publishing, tmp_path, job(work, lora=Lora(rank=4)))
    store.create("acme", A, ModelName("n"), Settings())
    with pytest.raises(FailedPrecondition, match="stands on models/n"):
        publish(publishing, tmp_path, job(work))
    with pytest.raises(FailedPrecondition, match="stands on models/n"):
        publishing.check_adapter("acme", SPEC)
    publishing.check_adapter("other", SPEC)
    assert not list(root.iterdir())


def test_folders_that_nobody_knows_are_removed_at_a_start(root: Path, tmp_path: Path) -> None:
    folders = AdapterFiles(root)
    folders.take(received(tmp_path), "known")
    folders.take(received(tmp_path), "orphan")
    with_open = folders.read("orphan", FILES)
    folders.keep_only({"known"})
    assert [each.name for each in root.iterdir()] == ["known"]
    assert with_open.read("adapter_config.json", 0, 10) == b"{}"  # a stream that uses it finishes
    with_open.close()
    with pytest.raises(NotFound):
        folders.read("orphan", FILES)
