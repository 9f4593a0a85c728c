"""What mutations with a `request_id` returned, in the database: the act and its record commit together."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import and_, delete, insert, select

from veneer_rpc.idempotency import RequestKey, check_same_body
from veneer_trainer.adapters.database import Database, Schema

SCHEMA = Schema(
    "requests",
    (
        (
            """CREATE TABLE requests (
                tenant TEXT NOT NULL, method TEXT NOT NULL, request_id TEXT NOT NULL,
                body_sha256 TEXT NOT NULL, result TEXT NOT NULL, recorded_s DOUBLE PRECISION NOT NULL,
                PRIMARY KEY (tenant, method, request_id))""",
            "CREATE INDEX requests_by_age ON requests (recorded_s)",
        ),
    ),
)

_RETENTION_S = 7 * 86_400.0


class SqlRequests:
    """An IdempotencyStore; results are remembered for a week.

    Args:
        database: where SCHEMA is.
        clock: seconds since 1970.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._requests = database.table("requests")

    def find(self, key: RequestKey, body_sha256: bytes) -> bytes | None:
        """Returns what a request returned the first time; None for one that has not succeeded yet.

        Raises:
            AlreadyExists: REQUEST_ID_REUSED: the id came with another body before.
        """
        columns = self._requests.c
        mine = and_(columns.tenant == key.tenant, columns.method == key.method, columns.request_id == key.request_id)
        query = select(columns.body_sha256, columns.result).where(mine)
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        check_same_body(key, bytes.fromhex(row.body_sha256), body_sha256)
        return bytes.fromhex(row.result)

    def once(self, key: RequestKey, body_sha256: bytes, act: Callable[[], bytes]) -> bytes:
        """See IdempotencyStore. The act runs inside the transaction: it must wait for nothing."""
        with self._database.write() as connection:
            found = self.find(key, body_sha256)
            if found is not None:
                return found
            now_s, columns = self._clock(), self._requests.c
            connection.execute(delete(self._requests).where(columns.recorded_s < now_s - _RETENTION_S))
            result = act()
            record = insert(self._requests).values(
                tenant=key.tenant,
                method=key.method,
                request_id=key.request_id,
                body_sha256=body_sha256.hex(),
                result=result.hex(),
                recorded_s=now_s,
            )
            connection.execute(record)
            return result
