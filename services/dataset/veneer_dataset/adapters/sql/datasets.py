"""Datasets in the database."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from veneer_dataset.adapters.sql.database import Database, from_us, now_us, to_us
from veneer_dataset.adapters.sql.versions import delete_versions, refuse_held
from veneer_dataset.domain.datasets import Dataset
from veneer_rpc.errors import Aborted, AlreadyExists, NotFound


class SqlDatasets:
    """A DatasetStore."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._datasets = database.table("datasets")
        self._versions = database.table("versions")

    def insert(self, tenant: str, dataset: Dataset) -> Dataset:
        """See DatasetStore."""
        try:
            with self._database.write() as connection, connection.begin_nested():
                connection.execute(
                    sa.insert(self._datasets).values(
                        tenant=tenant,
                        dataset_id=dataset.dataset_id,
                        uid=dataset.uid,
                        display_name=dataset.display_name,
                        default_prompt=dataset.default_prompt,
                        labels=msgspec.json.encode(dataset.labels).decode(),
                        latest_version="",
                        created_us=to_us(dataset.created),
                        updated_us=to_us(dataset.updated),
                        revision=dataset.revision,
                    )
                )
        except IntegrityError:
            name = f"datasets/{dataset.dataset_id}"
            raise AlreadyExists("DATASET_EXISTS", f"{name} is there already", resource=name) from None
        return dataset

    def get(self, tenant: str, dataset_id: str) -> Dataset:
        """See DatasetStore."""
        with self._database.read() as connection:
            row = connection.execute(self._select(tenant).where(self._datasets.c.dataset_id == dataset_id)).first()
        if row is None:
            raise _not_found(dataset_id)
        return _dataset(row)

    def page(self, tenant: str, before: int | None, limit: int) -> Sequence[tuple[int, Dataset]]:
        """See DatasetStore."""
        wanted = self._select(tenant).order_by(self._datasets.c.id.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(self._datasets.c.id < before)
        with self._database.read() as connection:
            return [(row.id, _dataset(row)) for row in connection.execute(wanted)]

    def replace(self, tenant: str, dataset: Dataset, etag: str) -> Dataset:
        """See DatasetStore."""
        with self._database.write() as connection:
            _check_etag(self.get(tenant, dataset.dataset_id), etag)
            connection.execute(
                sa.update(self._datasets)
                .where(self._datasets.c.tenant == tenant, self._datasets.c.dataset_id == dataset.dataset_id)
                .values(
                    display_name=dataset.display_name,
                    default_prompt=dataset.default_prompt,
                    labels=msgspec.json.encode(dataset.labels).decode(),
                    updated_us=now_us(),
                    revision=self._datasets.c.revision + 1,
                )
            )
            return self.get(tenant, dataset.dataset_id)

    def delete(self, tenant: str, dataset_id: str, etag: str, now: datetime) -> None:
        """See DatasetStore."""
        with self._database.write() as connection:
            _check_etag(self.get(tenant, dataset_id), etag)
            key = connection.scalar(
                sa.select(self._datasets.c.id).where(
                    self._datasets.c.tenant == tenant, self._datasets.c.dataset_id == dataset_id
                )
            )
            keys = list(connection.scalars(sa.select(self._versions.c.id).where(self._versions.c.dataset == key)))
            refuse_held(self._database, connection, keys, now)
            delete_versions(self._database, connection, keys)
            connection.execute(sa.delete(self._datasets).where(self._datasets.c.id == key))

    def _select(self, tenant: str) -> sa.Select[Any]:
        count = (
            sa.select(sa.func.count())
            .where(self._versions.c.dataset == self._datasets.c.id)
            .scalar_subquery()
            .label("version_count")
        )
        return sa.select(self._datasets, count).where(self._datasets.c.tenant == tenant)


def _dataset(row: sa.Row[Any]) -> Dataset:
    return Dataset(
        dataset_id=row.dataset_id,
        uid=row.uid,
        display_name=row.display_name,
        default_prompt=row.default_prompt,
        labels=msgspec.json.decode(row.labels),
        created=from_us(row.created_us),
        updated=from_us(row.updated_us),
        latest_version=row.latest_version,
        version_count=row.version_count,
        revision=row.revision,
    )


def _check_etag(dataset: Dataset, etag: str) -> None:
    if etag and etag != dataset.etag:
        raise Aborted("ETAG_STALE", f"datasets/{dataset.dataset_id} has etag {dataset.etag}, not {etag[:80]}")


def _not_found(dataset_id: str) -> NotFound:
    name = f"datasets/{dataset_id}"
    return NotFound("DATASET_NOT_FOUND", f"there is no {name}", resource=name)
