"""Which blobs tenants have, in the database."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from veneer_dataset.adapters.sql.database import Database, now_us, to_us
from veneer_dataset.domain.blobs import Blob

_ASKED_AT_ONCE = 500
DEFAULT_FRESH_S = 3600.0


class SqlBlobs:
    """A BlobIndex.

    Args:
        database: holds it.
        fresh_s: asking again within so many seconds is not noted anew: it would make each reading a writing.
    """

    def __init__(self, database: Database, fresh_s: float = DEFAULT_FRESH_S) -> None:
        self._database = database
        self.fresh_s = fresh_s
        self._blobs = database.table("blobs")
        self._named = database.table("version_pictures")

    def find(self, tenant: str, digests: Sequence[str]) -> Mapping[str, Blob]:
        """See BlobIndex."""
        table, found, stale = self._blobs, dict[str, Blob](), list[str]()
        columns = table.c.digest, table.c.size_bytes, table.c.location, table.c.asked_us
        now = now_us()
        fresh_us = now - int(self.fresh_s * 1_000_000)
        with self._database.read() as connection:
            for some in chunks(digests):
                wanted = sa.select(*columns).where(table.c.tenant == tenant, table.c.digest.in_(some))
                for digest, size_bytes, location, asked_us in connection.execute(wanted):
                    found[digest] = Blob(tenant, digest, size_bytes, location)
                    if asked_us <= fresh_us:
                        stale.append(digest)
        if not stale:
            return found
        with self._database.write() as connection:
            for some in chunks(stale):
                still = connection.scalars(
                    sa.update(table)
                    .where(table.c.tenant == tenant, table.c.digest.in_(some))
                    .values(asked_us=now)
                    .returning(table.c.digest)
                )
                for gone in set(some) - set(still):  # collected between the look and the note
                    del found[gone]
        return found

    def add(self, tenant: str, blobs: Sequence[Blob]) -> Sequence[Blob]:
        """See BlobIndex."""
        if not blobs:
            return []
        superfluous = []
        with self._database.write() as connection:
            for blob in blobs:
                insert = _insert(self._database, self._blobs).values(
                    tenant=blob.tenant,
                    digest=blob.digest,
                    size_bytes=blob.size_bytes,
                    location=blob.location,
                    asked_us=now_us(),
                )
                # One that was there already is as wanted as a new one.
                asked = insert.on_conflict_do_update(
                    index_elements=["tenant", "digest"], set_={"asked_us": insert.excluded.asked_us}
                )
                if connection.scalar(asked.returning(self._blobs.c.location)) != blob.location:
                    superfluous.append(blob)
        return superfluous

    def size_bytes(self, tenant: str) -> int:
        """See BlobIndex."""
        with self._database.read() as connection:
            total = sa.select(sa.func.sum(self._blobs.c.size_bytes)).where(self._blobs.c.tenant == tenant)
            return int(connection.scalar(total) or 0)

    def collect(self, not_since: datetime, limit: int) -> Sequence[Blob]:
        """See BlobIndex."""
        table, named = self._blobs, self._named
        unwanted = sa.and_(
            table.c.asked_us < to_us(not_since),
            ~sa.exists().where(named.c.tenant == table.c.tenant, named.c.digest == table.c.digest),
        )
        some = sa.select(table.c.location).where(unwanted).limit(limit)
        with self._database.write() as connection:
            gone = connection.execute(
                sa.delete(table).where(unwanted, table.c.location.in_(some)).returning(table)
            ).all()
        return [Blob(row.tenant, row.digest, row.size_bytes, row.location) for row in gone]

    def has_location(self, location: str) -> bool:
        """See BlobIndex."""
        with self._database.read() as connection:
            there = sa.select(sa.literal(1)).where(self._blobs.c.location == location)
            return connection.scalar(there) is not None


def insert_ignoring(database: Database, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """An insert that leaves rows alone whose key is there already."""
    return _insert(database, table).on_conflict_do_nothing()


def _insert(database: Database, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    return sqlite.insert(table) if database.is_sqlite else postgresql.insert(table)


def chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """Values, some at a time: a statement's parameters are bounded."""
    for start in range(0, len(values), _ASKED_AT_ONCE):
        yield values[start : start + _ASKED_AT_ONCE]
