"""Versions in the database, with their rows, findings and holds."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from veneer_dataset.adapters.sql.blobs import SqlBlobs, chunks
from veneer_dataset.adapters.sql.database import Database, from_us, now_us, to_us
from veneer_dataset.domain.findings import Finding, Severity
from veneer_dataset.domain.making import Made
from veneer_dataset.domain.report import Report, SplitSummary
from veneer_dataset.domain.versions import DatasetVersion, Hold, StoredVersion
from veneer_digests import CANONICALISER_VERSION
from veneer_rpc.errors import Aborted, FailedPrecondition, NotFound

_INSERTED_AT_ONCE = 2_000
_PARTS = ("version_rows", "findings", "holds", "version_pictures")


class SqlVersions:
    """A VersionStore."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._datasets = database.table("datasets")
        self._versions = database.table("versions")
        self._rows = database.table("version_rows")
        self._findings = database.table("findings")
        self._holds = database.table("holds")
        self._pictures = database.table("version_pictures")
        self._blobs = SqlBlobs(database)

    def save(
        self, tenant: str, dataset_id: str, made: Made, labels: Mapping[str, str], pictures: Sequence[str]
    ) -> DatasetVersion:
        """See VersionStore."""
        with self._database.write() as connection:
            dataset = self._dataset_key(connection, tenant, dataset_id)
            size_bytes = 0
            for some in chunks(pictures):
                blobs = self._blobs.find(tenant, some)
                if len(blobs) < len(some):
                    gone = min(set(some) - blobs.keys())
                    raise Aborted("PICTURE_GONE", f"picture {gone} was deleted meanwhile: upload it and try again")
                size_bytes += sum(blob.size_bytes for blob in blobs.values())
            kept = {
                "splits": msgspec.json.encode(made.splits).decode(),
                "report": msgspec.json.encode(made.report).decode(),
                "labels": msgspec.json.encode(dict(labels)).decode(),
            }
            key = connection.scalar(
                sa.select(self._versions.c.id).where(
                    self._versions.c.dataset == dataset, self._versions.c.digest == made.digest
                )
            )
            if key is None:
                key = self._insert(
                    connection, tenant, dataset, made, {**kept, "picture_size_bytes": size_bytes}, pictures
                )
            else:
                connection.execute(sa.update(self._versions).where(self._versions.c.id == key).values(kept))
                connection.execute(sa.delete(self._findings).where(self._findings.c.version == key))
            _insert_many(connection, self._findings, _finding_values(key, made.findings))
            connection.execute(
                sa.update(self._datasets)
                .where(self._datasets.c.id == dataset)
                .values(latest_version=made.digest, updated_us=now_us(), revision=self._datasets.c.revision + 1)
            )
            return self.get(tenant, dataset_id, made.digest).version

    def get(self, tenant: str, dataset_id: str, digest_prefix: str) -> StoredVersion:
        """See VersionStore."""
        wanted = self._select(tenant, dataset_id).where(
            self._versions.c.digest.startswith(digest_prefix, autoescape=True)
        )
        with self._database.read() as connection:
            found = connection.execute(wanted.limit(2)).all()
        if len(found) != 1:
            name = f"datasets/{dataset_id}/versions/{digest_prefix}"
            some = "several versions begin like" if found else "there is no"
            raise NotFound("VERSION_NOT_FOUND", f"{some} {name}", resource=name)
        return _stored(found[0])

    def page(self, tenant: str, dataset_id: str, before: int | None, limit: int) -> Sequence[StoredVersion]:
        """See VersionStore."""
        wanted = self._select(tenant, dataset_id).order_by(self._versions.c.id.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(self._versions.c.id < before)
        with self._database.read() as connection:
            self._dataset_key(connection, tenant, dataset_id)
            return [_stored(row) for row in connection.execute(wanted)]

    def delete(self, tenant: str, dataset_id: str, digest: str, now: datetime) -> None:
        """See VersionStore."""
        with self._database.write() as connection:
            key = self.get(tenant, dataset_id, digest).key
            refuse_held(self._database, connection, [key], now)
            delete_versions(self._database, connection, [key])
            dataset = self._dataset_key(connection, tenant, dataset_id)
            latest = (
                sa.select(self._versions.c.digest)
                .where(self._versions.c.dataset == dataset)
                .order_by(self._versions.c.id.desc())
                .limit(1)
            )
            connection.execute(
                sa.update(self._datasets)
                .where(self._datasets.c.id == dataset)
                .values(
                    latest_version=sa.func.coalesce(latest.scalar_subquery(), ""),
                    updated_us=now_us(),
                    revision=self._datasets.c.revision + 1,
                )
            )

    def findings(
        self, key: int, severity: Severity | None, code: str, after: int, limit: int
    ) -> Sequence[tuple[int, Finding]]:
        """See VersionStore."""
        table = self._findings
        wanted = sa.select(table).where(table.c.version == key, table.c.number > after)
        if severity is not None:
            wanted = wanted.where(table.c.severity == int(severity))
        if code:
            wanted = wanted.where(table.c.code == code)
        with self._database.read() as connection:
            found = connection.execute(wanted.order_by(table.c.number).limit(limit)).all()
        return [(row.number, Finding(row.code, row.path, row.line, row.json_path, row.found)) for row in found]

    def row_digests(self, key: int, start: int, count: int) -> bytes:
        """See VersionStore."""
        table = self._rows
        wanted = (
            sa.select(table.c.digest)
            .where(table.c.version == key, table.c.position >= start, table.c.position < start + count)
            .order_by(table.c.position)
        )
        with self._database.read() as connection:
            return b"".join(map(bytes, connection.execution_options(yield_per=10_000).scalars(wanted)))

    def rows(self, key: int, positions: Sequence[int]) -> Mapping[int, tuple[bytes, bytes]]:
        """See VersionStore."""
        table = self._rows
        wanted = sa.select(table.c.position, table.c.digest, table.c.content).where(
            table.c.version == key, table.c.position.in_(positions)
        )
        with self._database.read() as connection:
            return {
                position: (bytes(digest), bytes(content)) for position, digest, content in connection.execute(wanted)
            }

    def exists(self, key: int) -> bool:
        """See VersionStore."""
        with self._database.read() as connection:
            return connection.scalar(sa.select(sa.literal(1)).where(self._versions.c.id == key)) is not None

    def place_hold(self, key: int, hold: Hold) -> None:
        """See VersionStore."""
        with self._database.write() as connection:
            self.release_hold(key, hold.holder)
            connection.execute(
                sa.insert(self._holds).values(version=key, holder=hold.holder, expires_us=to_us(hold.expires))
            )

    def release_hold(self, key: int, holder: str) -> None:
        """See VersionStore."""
        with self._database.write() as connection:
            connection.execute(
                sa.delete(self._holds).where(self._holds.c.version == key, self._holds.c.holder == holder)
            )

    def _insert(
        self,
        connection: sa.Connection,
        tenant: str,
        dataset: int,
        made: Made,
        kept: Mapping[str, str | int],
        pictures: Sequence[str],
    ) -> int:
        key = connection.execute(
            sa.insert(self._versions)
            .values(
                dataset=dataset,
                digest=made.digest,
                canonicaliser_version=CANONICALISER_VERSION,
                picture_count=len(pictures),
                created_us=now_us(),
                **kept,
            )
            .returning(self._versions.c.id)
        ).scalar_one()
        rows = (
            {"version": key, "position": position, "digest": digest, "content": content}
            for position, (_, digest, content) in enumerate(made.stored_rows())
        )
        _insert_many(connection, self._rows, rows)
        _insert_many(
            connection,
            self._pictures,
            ({"version": key, "tenant": tenant, "digest": digest} for digest in pictures),
        )
        return int(key)

    def _dataset_key(self, connection: sa.Connection, tenant: str, dataset_id: str) -> int:
        key = connection.scalar(
            sa.select(self._datasets.c.id).where(
                self._datasets.c.tenant == tenant, self._datasets.c.dataset_id == dataset_id
            )
        )
        if key is None:
            name = f"datasets/{dataset_id}"
            raise NotFound("DATASET_NOT_FOUND", f"there is no {name}", resource=name)
        return int(key)

    def _select(self, tenant: str, dataset_id: str) -> sa.Select[Any]:
        holds = (
            sa.select(sa.func.count())
            .where(self._holds.c.version == self._versions.c.id, self._holds.c.expires_us > now_us())
            .scalar_subquery()
            .label("hold_count")
        )
        return (
            sa.select(self._versions, self._datasets.c.dataset_id, holds)
            .join(self._datasets, self._datasets.c.id == self._versions.c.dataset)
            .where(self._datasets.c.tenant == tenant, self._datasets.c.dataset_id == dataset_id)
        )


def refuse_held(database: Database, connection: sa.Connection, keys: Sequence[int], now: datetime) -> None:
    """Raises FailedPrecondition where one of the versions is held."""
    holds = database.table("holds")
    held = connection.execute(
        sa.select(holds).where(holds.c.version.in_(keys), holds.c.expires_us > to_us(now)).limit(1)
    ).first()
    if held is not None:
        raise FailedPrecondition(
            "VERSION_HELD",
            f"{held.holder} holds a version until {from_us(held.expires_us).astimezone(UTC):%FT%TZ}",
            metadata={"holder": held.holder},
        )


def delete_versions(database: Database, connection: sa.Connection, keys: Sequence[int]) -> None:
    """Removes versions with all that belongs to them; their pictures stay until they are collected."""
    for name in _PARTS:
        table = database.table(name)
        connection.execute(sa.delete(table).where(table.c.version.in_(keys)))
    versions = database.table("versions")
    connection.execute(sa.delete(versions).where(versions.c.id.in_(keys)))


def _finding_values(key: int, findings: Iterable[Finding]) -> Iterator[dict[str, Any]]:
    for number, each in enumerate(findings, 1):
        yield {
            "version": key,
            "number": number,
            "code": each.code,
            "severity": int(each.kind.severity),
            "path": each.path,
            "line": each.line,
            "json_path": each.json_path,
            "found": each.found,
        }


def _insert_many(connection: sa.Connection, table: sa.Table, values: Iterable[dict[str, Any]]) -> None:
    values = iter(values)
    while some := list(itertools.islice(values, _INSERTED_AT_ONCE)):
        connection.execute(sa.insert(table), some)


def _stored(row: sa.Row[Any]) -> StoredVersion:
    version = DatasetVersion(
        dataset_id=row.dataset_id,
        digest=row.digest,
        canonicaliser_version=row.canonicaliser_version,
        splits=msgspec.json.decode(row.splits, type=tuple[SplitSummary, ...]),
        report=msgspec.json.decode(row.report, type=Report),
        labels=msgspec.json.decode(row.labels),
        picture_size_bytes=row.picture_size_bytes,
        picture_count=row.picture_count,
        hold_count=row.hold_count,
        created=from_us(row.created_us),
    )
    return StoredVersion(row.id, version)
