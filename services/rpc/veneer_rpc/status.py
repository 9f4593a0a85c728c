"""The one table between exceptions and gRPC statuses, both ways.

An error travels as `google.rpc.Status` in the trailing metadata `grpc-status-details-bin`: always
ErrorInfo, and BadRequest, RetryInfo or ResourceInfo where there is something to say. Everything is bounded:
clients in several languages drop a call whose metadata is over 8 KiB, and would then see no error of ours
at all.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # its stubs replace grpc's

from veneer_rpc import errors, names

DOMAIN = "veneer"
DETAILS_KEY = "grpc-status-details-bin"
INTERNAL_TEXT = "internal error: the server's log has the cause under this call's request id"

MAX_MESSAGE_BYTES = 512
# base64 makes 5.5 KB of it; with a percent-encoded message of 1.5 KB it stays below 8 KiB.
MAX_DETAILS_BYTES = 4096
_MAX_VALUE_BYTES = 256
_MAX_METADATA_ENTRIES = 6

_CODES: dict[type[errors.VeneerError], grpc.StatusCode] = {
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Internal: grpc.StatusCode.INTERNAL,
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
}
_Metadata = Iterable[tuple[str, str | bytes]]
_CLASSES = {code: kind for kind, code in _CODES.items()}


def code_of(error: BaseException) -> grpc.StatusCode:
    """Returns the status code of an exception; INTERNAL for one that is not in the table."""
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), grpc.StatusCode.INTERNAL)


def from_exception(error: BaseException) -> status_pb2.Status:
    """Returns the wire form of an exception. One the table does not know says nothing but a fixed text."""
    if not isinstance(error, errors.VeneerError) or code_of(error) is grpc.StatusCode.INTERNAL:
        error = errors.Internal("INTERNAL", INTERNAL_TEXT)
    status = status_pb2.Status(code=code_of(error).value[0], message=_cut(error.message, MAX_MESSAGE_BYTES))
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key in list(error.metadata)[:_MAX_METADATA_ENTRIES]:
        info.metadata[_cut(key, 64)] = _cut(error.metadata[key], _MAX_VALUE_BYTES)
    status.details.add().Pack(info)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000))
        status.details.add().Pack(retry)
    if error.resource:
        status.details.add().Pack(
            error_details_pb2.ResourceInfo(
                resource_type=names.type_of(error.resource),
                resource_name=_cut(error.resource, _MAX_VALUE_BYTES),
            )
        )
    if error.violations:
        room = MAX_DETAILS_BYTES - status.ByteSize() - 64
        status.details.add().Pack(_bad_request(error.violations, room))
    return status


def from_rpc_error(error: grpc.RpcError) -> errors.VeneerError:
    """Returns the exception that a failed call stands for, whatever server or proxy made the status.

    Reads sync and aio errors alike. A status without our details (from gRPC's own core, or a proxy) has its
    code's name as its reason.
    """
    code: grpc.StatusCode = error.code()
    kind = _CLASSES.get(code, errors.Internal)
    reason, metadata, retry_after_s, resource = code.name, dict[str, str](), None, ""
    found: list[errors.Violation] = []
    for detail in _details(cast(_Metadata, error.trailing_metadata() or ())):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason, metadata = detail.reason, dict(detail.metadata)
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.ToMilliseconds() / 1000
        elif isinstance(detail, error_details_pb2.ResourceInfo):
            resource = detail.resource_name
        elif isinstance(detail, error_details_pb2.BadRequest):
            found += [errors.Violation(v.field, v.reason, v.description) for v in detail.field_violations]
    return kind(
        reason if errors.REASON.fullmatch(reason) else code.name,
        error.details() or code.name,
        metadata=metadata,
        violations=found,
        retry_after_s=retry_after_s,
        resource=resource,
    )


def _details(metadata: _Metadata) -> Iterator[Any]:
    """Yields the details that came along and that the table knows."""
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.RetryInfo,
        error_details_pb2.ResourceInfo,
        error_details_pb2.BadRequest,
    )
    raw = next((value for key, value in metadata if key == DETAILS_KEY and isinstance(value, bytes)), b"")
    try:
        packed = status_pb2.Status.FromString(raw).details
        for kind, each in itertools.product(kinds, packed):
            detail = kind()
            if each.Unpack(detail):
                yield detail
    except DecodeError:  # not from us, or damaged on its way: code and message still tell
        return


def _bad_request(found: tuple[errors.Violation, ...], room_bytes: int) -> error_details_pb2.BadRequest:
    """Returns all violations, or those that fit and a last one that says how many more there are."""
    request = error_details_pb2.BadRequest()
    for index, violation in enumerate(found):
        entry = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(violation.field, _MAX_VALUE_BYTES),
            reason=_cut(violation.reason, 63),
            description=_cut(violation.description, MAX_MESSAGE_BYTES),
        )
        room_bytes -= entry.ByteSize() + 3
        left = len(found) - index
        if room_bytes < (80 if left > 1 else 0):  # 80: what the last one takes
            request.field_violations.add(reason="MORE_VIOLATIONS", description=f"{left} more, left out here")
            break
        request.field_violations.append(entry)
    return request


def _cut(text: str, limit_bytes: int) -> str:
    """Cuts a text to so many bytes of UTF-8, between two characters."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    return raw[: limit_bytes - 3].decode("utf-8", "ignore") + "…"
