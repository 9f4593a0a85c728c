"""The exceptions a domain raises for its callers, free of grpc and protobuf; `status` puts them on the wire.

VeneerError
├── Aborted             a conflict: read again, then try the whole operation again
├── AlreadyExists       the name or request id is taken
├── Cancelled           the caller gave up
├── DataLoss            bytes do not match their digest
├── DeadlineExceeded    time ran out
├── FailedPrecondition  right request, wrong state: retrying alone does not help
├── Internal            a broken invariant of ours
├── InvalidArgument     wrong whatever the state; carries every violation
├── NotFound            no such thing for this tenant
├── OutOfRange          past the end of something that may grow
├── PermissionDenied    known caller, not allowed
├── ResourceExhausted   over a bound; `retry_after_s` is the hint
├── Unauthenticated     no valid credential
├── Unavailable         try again; `retry_after_s` is the hint
└── Unimplemented       this server does not do that
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

# google.rpc.ErrorInfo.reason: at most 63 characters of UPPER_SNAKE_CASE.
REASON = re.compile(r"[A-Z][A-Z0-9_]{0,61}[A-Z0-9]")


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field: its path (`spec.lora.rank`), an UPPER_SNAKE reason, and limit and value in words."""

    field: str
    reason: str
    description: str


class VeneerError(Exception):
    """Something a caller should hear about.

    Args:
        reason: UPPER_SNAKE, stable: programs branch on it.
        message: for people: place, limit and actual value. No path of this machine, no secret.
        metadata: facts a program may want, such as `{"limit": "512"}`.
        violations: every wrong field of the request.
        retry_after_s: when to try again.
        resource: the name of the resource it is about.

    Raises:
        ValueError: the reason is not UPPER_SNAKE of 2 to 63 characters.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        resource: str = "",
    ) -> None:
        super().__init__(message)
        if not REASON.fullmatch(reason):
            raise ValueError(f"reason must be UPPER_SNAKE of 2 to 63 characters, was {reason!r}")
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.resource = resource


class Aborted(VeneerError):
    """A conflict with another writer; the operation as a whole may be tried again."""


class AlreadyExists(VeneerError):
    """What was to be created is there already."""


class Cancelled(VeneerError):
    """The caller gave up."""


class DataLoss(VeneerError):
    """Bytes are damaged or do not match their digest."""


class DeadlineExceeded(VeneerError):
    """Time ran out before the work was done."""


class FailedPrecondition(VeneerError):
    """The request is right but the system's state is not."""


class Internal(VeneerError):
    """A broken invariant of the server."""


class InvalidArgument(VeneerError):
    """The request is wrong whatever the state of the system."""


class NotFound(VeneerError):
    """There is no such thing, or none that this tenant may know of."""


class OutOfRange(VeneerError):
    """An offset or size lies past what is there or was declared."""


class PermissionDenied(VeneerError):
    """The caller is known and may not do this."""


class ResourceExhausted(VeneerError):
    """A bound, quota or queue is full."""


class Unauthenticated(VeneerError):
    """There is no valid credential."""


class Unavailable(VeneerError):
    """The service cannot answer now; the same call may succeed later."""


class Unimplemented(VeneerError):
    """The server does not offer this."""


@dataclass(slots=True)
class Violations:
    """Collects what is wrong with one request, so that the caller hears of all of it at once."""

    found: list[Violation] = field(default_factory=list)

    def add(self, field: str, reason: str, description: str) -> None:
        """Notes one violation."""
        self.found.append(Violation(field, reason, description))

    def attempt(self, parse: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        """Returns `parse(*args, **kwargs)`, or None after noting the violations of its InvalidArgument."""
        try:
            return parse(*args, **kwargs)
        except InvalidArgument as error:
            if not error.violations:
                raise
            self.found += error.violations
            return None


@contextmanager
def violations() -> Iterator[Violations]:
    """Runs checks to the end, then raises once.

    Raises:
        InvalidArgument: at the end of the block, with every violation that was added.
    """
    collected = Violations()
    yield collected
    if collected.found:
        raise invalid(*collected.found)


def invalid(*found: Violation) -> InvalidArgument:
    """Returns the InvalidArgument that reports these violations."""
    first = f"{found[0].field}: {found[0].description}"
    others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return InvalidArgument("INVALID_FIELDS", first + others, violations=found)
