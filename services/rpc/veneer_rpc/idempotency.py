"""Mutations with a `request_id`: done once, however often and from however many threads they are sent.

The port is one method, so that a database can run the act and remember its result in one transaction: a
record written before or after the act would double or lose it when the process dies in between. Only
success is remembered; after an error the same id may be tried again.
"""

import hashlib
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from veneer_rpc.errors import AlreadyExists, ResourceExhausted, Violation, invalid


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Whose request it is. Two tenants may use the same id, and so may two methods."""

    tenant: str
    method: str
    request_id: str


class IdempotencyStore(Protocol):
    """Remembers results of mutations for at least a retention."""

    def once(self, key: RequestKey, body_sha256: bytes, act: Callable[[], bytes]) -> bytes:
        """Runs an act and remembers what it returned, or returns what it returned the first time.

        Of several callers with one key at once, one acts and the others wait for it.

        Raises:
            AlreadyExists: REQUEST_ID_REUSED: the id came with another body before.
        """


def parse_request_id(text: str, field: str = "request_id") -> str:
    """Returns a request id in its usual form (lower case, with hyphens).

    Raises:
        InvalidArgument: it is not a UUID, or the nil UUID, which AIP-155 refuses.
    """
    try:
        value = uuid.UUID(text)
    except ValueError:
        value = uuid.UUID(int=0)
    if value.int == 0 or text.lower() != str(value):
        raise invalid(Violation(field, "INVALID_UUID", f"must be a UUID such as {uuid.uuid4()}, was {text[:80]!r}"))
    return str(value)


class _Message(Protocol):
    """The part of a protobuf message that a digest needs; this module imports no protobuf."""

    def CopyFrom(self, other: Self) -> None: ...
    def ClearField(self, field_name: Any) -> None: ...  # noqa: ANN401  # the stub narrows it to literals
    def SerializeToString(self, *, deterministic: bool = ...) -> bytes: ...


def body_sha256(request: _Message) -> bytes:
    """Returns the digest by which two requests with one id are the same; for the edge, which has the message.

    Protobuf bytes are not canonical, so the bytes on the wire are not used: a client in another language
    may order fields or map entries differently. The parsed message, serialised deterministically by this
    process, is the same for equal messages. That holds within one version of the server. A client newer
    than the server sends fields that it does not know; if the server is replaced in the middle of such a
    client's retries, a retry may be refused as REQUEST_ID_REUSED. It is never done twice.
    """
    body = type(request)()
    body.CopyFrom(request)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).digest()


def check_same_body(key: RequestKey, first_sha256: bytes, sha256: bytes) -> None:
    """Lets a repeated request pass.

    Raises:
        AlreadyExists: its body is another than the first one's.
    """
    if first_sha256 != sha256:
        raise AlreadyExists(
            "REQUEST_ID_REUSED", f"request_id {key.request_id} came with another body before; use a new one"
        )


@dataclass(slots=True)
class _Record:
    body_sha256: bytes
    lock: threading.Lock = field(default_factory=threading.Lock)
    expires_s: float = float("inf")  # until there is a result
    result: bytes | None = None


class MemoryStore:
    """An IdempotencyStore that ends with its process.

    Args:
        retention_s: how long a result is remembered.
        max_per_tenant: results remembered for one tenant. When they are all young, a new id is refused, since
            forgetting one would break what was promised for it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        retention_s: float = 86_400.0,
        max_per_tenant: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retention_s = retention_s
        self._max_per_tenant = max_per_tenant
        self._clock = clock
        self._lock = threading.Lock()
        self._tenants: dict[str, OrderedDict[RequestKey, _Record]] = {}

    def once(self, key: RequestKey, body_sha256: bytes, act: Callable[[], bytes]) -> bytes:
        """See IdempotencyStore.

        Raises:
            AlreadyExists: the id came with another body before.
            ResourceExhausted: the tenant's ids are all in use.
        """
        while True:
            record = self._claim(key, body_sha256)
            with record.lock:
                if record.result is not None:
                    return record.result
                if not self._current(key, record):
                    continue  # the first one failed while we waited: be the first
                try:
                    record.result = act()
                finally:
                    self._settle(key, record)
                return record.result

    def _claim(self, key: RequestKey, body_sha256: bytes) -> _Record:
        with self._lock:
            records = self._tenants.setdefault(key.tenant, OrderedDict())
            self._forget_old(records)
            record = records.get(key)
            if record is not None:
                check_same_body(key, record.body_sha256, body_sha256)
                return record
            if len(records) >= self._max_per_tenant:
                raise ResourceExhausted(
                    "TOO_MANY_REQUEST_IDS",
                    f"{self._max_per_tenant} request ids are remembered, the limit; send none, or wait",
                    retry_after_s=self._retention_s,
                )
            records[key] = _Record(body_sha256)
            return records[key]

    def _settle(self, key: RequestKey, record: _Record) -> None:
        with self._lock:
            records = self._tenants[key.tenant]
            if record.result is None:
                del records[key]
            else:
                record.expires_s = self._clock() + self._retention_s
                records.move_to_end(key)  # so that the oldest result comes first

    def _current(self, key: RequestKey, record: _Record) -> bool:
        with self._lock:
            return self._tenants[key.tenant].get(key) is record

    def _forget_old(self, records: OrderedDict[RequestKey, _Record]) -> None:
        now_s = self._clock()
        for key, record in list(records.items()):
            if record.expires_s > now_s:
                if record.result is not None:
                    break
                continue
            del records[key]
