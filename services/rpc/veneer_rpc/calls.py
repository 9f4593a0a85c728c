"""The call that is being served: who asks, for which tenant, under which id, and how much time is left.

`interceptors` makes it, servicers and outgoing channels read it. A domain gets what it needs as arguments
instead.
"""

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a credential stands for. `subject` names a service that acts for the tenant, if one does."""

    tenant: str
    roles: frozenset[str]
    subject: str = ""


@dataclass(slots=True)
class Call:
    """One call, from admission to its status."""

    method: str
    request_id: str
    started_s: float = field(default_factory=time.monotonic)
    deadline_s: float = float("inf")
    principal: Principal | None = None
    finished: bool = False

    @property
    def tenant(self) -> str:
        """The tenant that the caller may see; empty for a health probe."""
        return self.principal.tenant if self.principal else ""

    def time_remaining_s(self) -> float:
        """Seconds until the deadline, never below 0."""
        return max(self.deadline_s - time.monotonic(), 0.0)


_current: ContextVar[Call | None] = ContextVar("veneer_rpc_call", default=None)


def enter(call: Call) -> None:
    """Makes a call the current one of this task and of the threads and tasks it starts."""
    _current.set(call)


def current_call() -> Call | None:
    """Returns the call being served; None outside, and in a background task that outlived its call."""
    call = _current.get()
    return None if call is None or call.finished else call


def serving_call() -> Call:
    """Returns the call being served.

    Raises:
        LookupError: no call is being served here.
    """
    call = current_call()
    if call is None:
        raise LookupError("no call is being served here")
    return call


def request_id_from(text: str | None) -> str:
    """Returns the caller's request id if it is fit for a log line, else a new one."""
    return text if text and _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex
