"""What can go wrong, as exceptions: a user of this package never meets `grpc.RpcError`.

VeneerError
├── ClusterNotFound         no address or token was given, and no cluster runs here
├── FolderError             the folder to send cannot be understood
├── NotComparable           two evaluations share no rows or no metric
├── OtherAnswers            a file of answers to another question cannot be gone on with
├── WorkFailed              a job or an evaluation ended without success; `.resource` is the whole of it
└── StatusError             a service refused, or could not be reached
    ├── Aborted             a conflict: read again, then try the whole operation again
    ├── AlreadyExists       the name or request id is taken
    ├── Cancelled           the call was given up
    ├── DataLoss            bytes do not match their digest
    ├── DeadlineExceeded    time ran out
    ├── FailedPrecondition  right request, wrong state
    │   └── RowsRefused     a push made no version; `.findings` says why
    ├── Internal            a defect of the service
    ├── InvalidArgument     wrong whatever the state; `.violations` has every wrong field
    ├── NotFound            no such thing for this token
    ├── OutOfRange          past the end of something
    ├── PermissionDenied    the token does not allow it
    ├── ResourceExhausted   over a bound; `.retry_after_s` says when to come back
    ├── Unauthenticated     no token, or one that the service does not know
    ├── Unavailable         the service cannot be reached or cannot answer now
    └── Unimplemented       this service does not offer it
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # its stubs replace grpc's

if TYPE_CHECKING:
    from veneer.dataset.v1.dataset_pb2 import Finding
    from veneer.trainer.v1.evaluation_pb2 import Evaluation
    from veneer.trainer.v1.export_pb2 import Export
    from veneer.trainer.v1.training_job_pb2 import TrainingJob

_D = TypeVar("_D", bound=Message)
_DETAILS_KEY = "grpc-status-details-bin"


class VeneerError(Exception):
    """Anything that this package raises on purpose. Its text says what happened and what to do."""


class ClusterNotFound(VeneerError):
    """Nothing says where the services are, or with which token to call them."""


class FolderError(VeneerError):
    """A folder that cannot be sent; the text names the place."""


class NotComparable(VeneerError):
    """Two evaluations that have no rows or no metric in common."""


class OtherAnswers(VeneerError):
    """A file of answers that were given by another, or to another question; the text says which."""


class WorkFailed(VeneerError):
    """A job, an evaluation or an export that ended without success."""

    def __init__(self, resource: "TrainingJob | Evaluation | Export", text: str) -> None:
        super().__init__(text)
        self.resource = resource


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field of a request: its path, an UPPER_SNAKE reason, and limit and value in words."""

    field: str
    reason: str
    description: str


class StatusError(VeneerError):
    """A call that a service refused, or that did not reach it.

    Attributes:
        reason: UPPER_SNAKE and stable, for programs to branch on.
        message: for people.
        metadata: facts of the error, such as a limit.
        violations: every wrong field of the request.
        retry_after_s: when the service says that trying again makes sense; None when it does not say.
        resource: the name of the resource it is about, or an empty text.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: dict[str, str] | None = None,
        violations: Iterable[Violation] = (),
        retry_after_s: float | None = None,
        resource: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = metadata or {}
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.resource = resource

    def __str__(self) -> str:
        return f"{self.message} ({self.reason})"


class Aborted(StatusError):
    """A conflict with another writer."""


class AlreadyExists(StatusError):
    """What was to be created is there already."""


class Cancelled(StatusError):
    """The call was given up."""


class DataLoss(StatusError):
    """Bytes are damaged or do not match their digest."""


class DeadlineExceeded(StatusError):
    """Time ran out before the work was done."""


class FailedPrecondition(StatusError):
    """The request is right but the state of what it names is not."""


class RowsRefused(FailedPrecondition):
    """Rows were refused, and with them the version. `findings` holds the first 100 reasons."""

    findings: tuple["Finding", ...] = ()

    @classmethod
    def of(cls, error: FailedPrecondition, findings: Iterable["Finding"]) -> "RowsRefused":
        """Returns the service's error together with what it found."""
        refused = cls(error.reason, error.message, metadata=error.metadata, resource=error.resource)
        refused.findings = tuple(findings)
        return refused


class Internal(StatusError):
    """A defect of the service; its log has the cause."""


class InvalidArgument(StatusError):
    """The request is wrong whatever the state."""


class NotFound(StatusError):
    """There is no such thing, or none that this token may know of."""


class OutOfRange(StatusError):
    """An offset or size lies past what is there or was declared."""


class PermissionDenied(StatusError):
    """The token is known and may not do this."""


class ResourceExhausted(StatusError):
    """A bound, quota or queue is full."""


class Unauthenticated(StatusError):
    """There is no valid token."""


class Unavailable(StatusError):
    """The service cannot be reached, or cannot answer now."""


class Unimplemented(StatusError):
    """This service does not offer it."""


_KINDS: dict[grpc.StatusCode, type[StatusError]] = {
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.UNKNOWN: Internal,
}


def from_rpc_error(error: grpc.aio.AioRpcError, address: str) -> StatusError:
    """Returns the exception that a failed call stands for.

    A status without details comes from gRPC itself or from a proxy: its code is the reason then, and where
    the service could not be reached the text names the address.
    """
    code = error.code()
    details = _details(error)
    info = _first(details, error_details_pb2.ErrorInfo)
    if info is None and code is grpc.StatusCode.CANCELLED:
        # Not this side's own cancelling, which asyncio raises: the server dropped the call as it stopped.
        code = grpc.StatusCode.UNAVAILABLE
    retry = _first(details, error_details_pb2.RetryInfo)
    resource = _first(details, error_details_pb2.ResourceInfo)
    request = _first(details, error_details_pb2.BadRequest)
    message = error.details() or code.name
    if info is None and code is grpc.StatusCode.UNAVAILABLE:
        message = f"{address} cannot be reached: {message}"
    return _KINDS.get(code, Internal)(
        info.reason if info else code.name,
        message,
        metadata=dict(info.metadata) if info else None,
        violations=[Violation(v.field, v.reason, v.description) for v in request.field_violations] if request else (),
        retry_after_s=retry.retry_delay.ToMilliseconds() / 1000 if retry else None,
        resource=resource.resource_name if resource else "",
    )


def _details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    metadata = cast(Iterable[tuple[str, str | bytes]], error.trailing_metadata() or ())
    packed = next((value for key, value in metadata if key == _DETAILS_KEY), b"")
    try:
        return status_pb2.Status.FromString(packed)
    except DecodeError:  # a proxy's; code and message still tell
        return status_pb2.Status()


def _first(status: status_pb2.Status, kind: type[_D]) -> _D | None:
    detail = kind()
    for packed in status.details:
        try:
            if packed.Unpack(detail):
                return detail
        except DecodeError:
            continue
    return None
