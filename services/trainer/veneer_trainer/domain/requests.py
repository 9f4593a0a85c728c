"""A mutation as it came in: who asks, and whether it may be the second time."""

from __future__ import annotations

from dataclasses import dataclass

from veneer_rpc.idempotency import RequestKey


@dataclass(frozen=True, slots=True)
class Request:
    """A mutation that may come twice: whose it is, and the digest of what it says; no key without an id.

    `actor` is the principal, for histories.
    """

    tenant: str
    key: RequestKey | None
    body_sha256: bytes
    actor: str = ""
