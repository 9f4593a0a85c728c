"""What each store promises, on each database."""

import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from veneer_dataset.adapters.folder_blobs import FolderBlobs
from veneer_dataset.adapters.partial_folder import PartialFolder
from veneer_dataset.adapters.sql.blobs import SqlBlobs
from veneer_dataset.adapters.sql.database import Database
from veneer_dataset.adapters.sql.datasets import SqlDatasets
from veneer_dataset.adapters.sql.facts import SqlFacts
from veneer_dataset.adapters.sql.requests import SqlRequests
from veneer_dataset.adapters.sql.versions import SqlVersions
from veneer_dataset.domain.blobs import Blob, Blobs
from veneer_dataset.domain.datasets import changed, new_dataset
from veneer_dataset.domain.intake import RowFile
from veneer_dataset.domain.making import Made, Submission, make_version
from veneer_dataset.domain.pictures import PictureFacts
from veneer_dataset.domain.progress import Progress
from veneer_dataset.domain.versions import Hold
from veneer_rpc.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound
from veneer_rpc.idempotency import RequestKey


class NoPictures:
    def check(self, digests: Iterator[str], inline_folder: Path) -> Iterator[tuple[int, PictureFacts]]:
        return iter(())


def made_of(folder: Path, rows: bytes) -> Made:
    made = Made(folder)
    submission = Submission((RowFile("train.jsonl", "0" * 64),), "", None, "")
    make_version(made, submission, lambda _: iter([rows]), NoPictures(), None, Progress())
    return made


ROWS = (
    b"".join(b'{"prompt":"%d","text":"t%d","extra":1}\n' % (number, number) for number in range(5)) + b'{"text":"x"}\n'
)


def test_a_database_is_opened_again_and_a_newer_one_refused(url: str) -> None:
    first = Database(url)
    key = first.secret("pages", 32)
    first.close()
    second = Database(url)
    assert second.secret("pages", 32) == key
    import sqlalchemy as sa

    with second.write() as connection:
        connection.execute(sa.text("INSERT INTO schema_steps VALUES (999)"))
    second.close()
    with pytest.raises(RuntimeError, match="schema"):
        Database(url)


def test_datasets(database: Database) -> None:
    store = SqlDatasets(database)
    made = [store.insert("acme", new_dataset(f"d{number}", labels={"k": "v"})) for number in range(5)]
    with pytest.raises(AlreadyExists):
        store.insert("acme", new_dataset("d0"))
    store.insert("other", new_dataset("d0"))
    assert store.get("acme", "d3") == made[3]
    page = store.page("acme", None, 3)
    assert [dataset.dataset_id for _, dataset in page] == ["d4", "d3", "d2"]
    assert [dataset.dataset_id for _, dataset in store.page("acme", page[-1][0], 3)] == ["d1", "d0"]
    new = store.replace("acme", changed(made[0], {"default_prompt": "p"}), made[0].etag)
    assert (new.default_prompt, new.uid) == ("p", made[0].uid)
    assert new.etag != made[0].etag
    for stale in (
        lambda: store.replace("acme", made[0], made[0].etag),
        lambda: store.delete("acme", "d0", made[0].etag, datetime.now(UTC)),
    ):
        with pytest.raises(Aborted):
            stale()
    store.delete("acme", "d0", new.etag, datetime.now(UTC))
    with pytest.raises(NotFound):
        store.get("acme", "d0")
    assert store.get("other", "d0").dataset_id == "d0"


def test_versions(database: Database, tmp_path: Path) -> None:
    datasets, versions = SqlDatasets(database), SqlVersions(database)
    datasets.insert("acme", new_dataset("d"))
    with made_of(tmp_path, ROWS) as made:
        version = versions.save("acme", "d", made, {"a": "b"}, [])
        assert versions.save("acme", "d", made, {"a": "c"}, []).labels == {"a": "c"}
    assert (version.report.accepted_rows, version.report.refused_rows) == (5, 1)
    stored = versions.get("acme", "d", version.digest[:12])
    assert stored.version.digest == version.digest
    assert datasets.get("acme", "d").latest_version == version.digest
    assert datasets.get("acme", "d").version_count == 1
    digests = versions.row_digests(stored.key, 0, 5)
    assert [digests[at : at + 32] for at in range(0, 160, 32)] == sorted(
        digests[at : at + 32] for at in range(0, 160, 32)
    )
    rows = versions.rows(stored.key, [4, 0, 9])
    assert sorted(rows) == [0, 4]
    assert all(row.startswith(b'{"messages":') for _, row in rows.values())
    assert [rows[position][0] for position in (0, 4)] == [digests[:32], digests[128:]]
    assert versions.exists(stored.key)
    found = versions.findings(stored.key, None, "", 0, 10)
    assert [each.code for _, each in found] == ["FIELD_UNREAD", "FIELD_MISSING"]
    assert len(versions.findings(stored.key, None, "FIELD_MISSING", 0, 10)) == 1
    assert not versions.findings(stored.key, None, "", found[-1][0], 10)
    now = datetime.now(UTC)
    versions.place_hold(stored.key, Hold("jobs/1", now - timedelta(seconds=1)))
    assert versions.get("acme", "d", version.digest).version.hold_count == 0
    versions.place_hold(stored.key, Hold("jobs/1", now + timedelta(hours=1)))
    with pytest.raises(FailedPrecondition, match="jobs/1"):
        versions.delete("acme", "d", version.digest, now)
    with pytest.raises(FailedPrecondition):
        datasets.delete("acme", "d", "", now)
    versions.release_hold(stored.key, "jobs/1")
    for stranger in (lambda: versions.get("other", "d", version.digest), lambda: versions.page("other", "d", None, 5)):
        with pytest.raises(NotFound):
            stranger()
    versions.delete("acme", "d", version.digest, now)
    assert not versions.exists(stored.key)
    assert datasets.get("acme", "d").latest_version == ""
    with pytest.raises(NotFound):
        versions.get("acme", "d", version.digest)


def test_a_picture_that_is_gone_keeps_a_version_from_being_saved(database: Database, tmp_path: Path) -> None:
    SqlDatasets(database).insert("acme", new_dataset("d"))
    with made_of(tmp_path, ROWS) as made, pytest.raises(Aborted):
        SqlVersions(database).save("acme", "d", made, {}, ["0" * 64])
    assert not SqlVersions(database).page("acme", "d", None, 5)


def test_blobs(database: Database, tmp_path: Path) -> None:
    index = SqlBlobs(database)
    some = [Blob("acme", f"{number:064x}", number, f"acme/00/{number}-1") for number in range(1200)]
    assert not index.add("acme", some)
    twin = Blob("acme", some[7].digest, 7, "acme/00/7-2")
    assert index.add("acme", [twin]) == [twin]
    assert index.find("acme", [blob.digest for blob in some]) == {blob.digest: blob for blob in some}
    assert not index.find("other", [some[0].digest])
    assert index.size_bytes("acme") == sum(range(1200))
    assert index.has_location("acme/00/7-1")
    assert not index.has_location("acme/00/7-2")
    long_ago, soon = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=1)
    assert not index.collect(long_ago, 10_000)
    assert len(index.collect(soon, 1000)) == 1000
    assert len(index.collect(soon, 1000)) == 200


def test_a_picture_that_a_version_names_is_not_collected(database: Database, tmp_path: Path) -> None:
    index = SqlBlobs(database)
    SqlDatasets(database).insert("acme", new_dataset("d"))
    named, loose = (Blob("acme", digit * 64, 1, f"acme/{digit}") for digit in "12")
    index.add("acme", [named, loose])
    with made_of(tmp_path, ROWS) as made:
        SqlVersions(database).save("acme", "d", made, {}, [named.digest])
    assert list(index.collect(datetime.now(UTC) + timedelta(hours=1), 10)) == [loose]


def test_who_asks_for_a_blob_keeps_it(database: Database) -> None:
    index = SqlBlobs(database, fresh_s=0)
    blob = Blob("acme", "1" * 64, 1, "acme/1")
    asks = (
        lambda: index.add("acme", [blob]),
        lambda: index.find("acme", [blob.digest]),
        lambda: index.add("acme", [Blob("acme", blob.digest, 1, "acme/1-2")]),  # sent once more
    )
    for ask in asks:
        before = datetime.now(UTC)
        ask()
        assert not index.collect(before, 10)
    SqlBlobs(database, fresh_s=60).find("acme", [blob.digest])  # not noted: it was asked for a moment ago
    assert index.collect(datetime.now(UTC), 10) == [blob]


def test_what_a_work_needs_stays_past_any_grace(database: Database, tmp_path: Path) -> None:
    store = FolderBlobs(tmp_path / "blobs")
    blobs = Blobs(store, SqlBlobs(database, fresh_s=60), PartialFolder(tmp_path / "partial"))
    (tmp_path / "file").write_bytes(b"x")
    blobs.add("acme", [("1" * 64, tmp_path / "file")])

    def tomorrow() -> datetime:
        return datetime.now(UTC) + timedelta(days=1)

    with blobs.needed():
        with blobs.needed():
            assert blobs.known("acme", ["1" * 64])
        assert blobs.collect(3600, tomorrow) == 0
    assert blobs.collect(3600, tomorrow) == 1
    assert not list(store.locations())


def test_facts(database: Database) -> None:
    store = SqlFacts(database)
    facts = {"a": PictureFacts(3, 4, 2**64 - 1), "b": PictureFacts(code="PICTURE_BROKEN", found="x")}
    store.add("acme", facts)
    store.add("acme", {"a": PictureFacts(9, 9, 9)})
    assert store.find("acme", ["a", "b", "c"]) == facts
    assert not store.find("other", ["a"])


def test_a_request_is_done_once_from_many_threads(database: Database) -> None:
    store = SqlRequests(database)
    key = RequestKey("acme", "m", str(uuid.uuid4()))
    done: list[int] = []

    def act() -> bytes:
        done.append(1)
        return b"result"

    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(store.once(key, b"1" * 32, act))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"result"] * 8
    assert done == [1]
    with pytest.raises(AlreadyExists):
        store.once(key, b"2" * 32, act)
    failed = RequestKey("acme", "m", str(uuid.uuid4()))
    with pytest.raises(NotFound):
        store.once(failed, b"1" * 32, lambda: SqlDatasets(database).get("acme", "none") and b"")
    assert store.once(failed, b"1" * 32, act) == b"result"
