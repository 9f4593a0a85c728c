"""Results of mutations by request id, in the database and in the transaction of the mutation itself."""

from collections.abc import Callable

import sqlalchemy as sa

from veneer_dataset.adapters.sql.database import Database, now_us
from veneer_rpc.idempotency import RequestKey, check_same_body

_RETENTION_US = 7 * 24 * 3600 * 1_000_000


class SqlRequests:
    """An IdempotencyStore."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._requests = database.table("requests")

    def once(self, key: RequestKey, body_sha256: bytes, act: Callable[[], bytes]) -> bytes:
        """See IdempotencyStore."""
        with self._database.write() as connection:
            if not self._database.is_sqlite:  # where writers do not exclude one another by themselves
                lock = sa.func.hashtextextended(f"{key.tenant}/{key.method}/{key.request_id}", 0)
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))
            found = self.find(key, body_sha256)
            if found is None:
                found = act()
                self.remember(key, body_sha256, found)
            return found

    def find(self, key: RequestKey, body_sha256: bytes) -> bytes | None:
        """The result of a request that was done before.

        Raises:
            AlreadyExists: its id came with another body.
        """
        table = self._requests
        wanted = sa.select(table.c.body_sha256, table.c.result).where(
            table.c.tenant == key.tenant, table.c.method == key.method, table.c.request_id == key.request_id
        )
        with self._database.read() as connection:
            row = connection.execute(wanted).first()
        if row is None:
            return None
        check_same_body(key, bytes(row.body_sha256), body_sha256)
        return bytes(row.result)

    def remember(self, key: RequestKey, body_sha256: bytes, result: bytes) -> None:
        """Keeps a result; those that are old enough go."""
        table, now = self._requests, now_us()
        with self._database.write() as connection:
            connection.execute(sa.delete(table).where(table.c.created_us < now - _RETENTION_US))
            connection.execute(
                sa.insert(table).values(
                    tenant=key.tenant,
                    method=key.method,
                    request_id=key.request_id,
                    body_sha256=body_sha256,
                    result=result,
                    created_us=now,
                )
            )
