"""From the call that is being served to the domain's Request."""

from __future__ import annotations

from typing import Any

from veneer_rpc.calls import serving_call
from veneer_rpc.idempotency import RequestKey, body_sha256, parse_request_id
from veneer_trainer.domain.requests import Request


def request_of(message: Any) -> Request:  # noqa: ANN401  # any message with a request id
    """Returns who asks, and what makes a repetition known.

    Raises:
        InvalidArgument: the request id is not a UUID.
    """
    call, actor = serving_call(), principal()
    if not message.request_id:
        return Request(call.tenant, None, b"", actor)
    key = RequestKey(call.tenant, call.method, parse_request_id(message.request_id))
    return Request(call.tenant, key, body_sha256(message), actor)


def principal() -> str:
    """Returns who asks, for histories: the service that acts for the tenant, or the tenant itself."""
    caller = serving_call().principal
    return (caller.subject or caller.tenant) if caller else ""


def has_role(role: str) -> bool:
    """Says whether the caller has a role."""
    caller = serving_call().principal
    return caller is not None and role in caller.roles
