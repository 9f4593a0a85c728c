"""The engine's errors as the service's callers hear them."""

from collections.abc import Iterator
from contextlib import contextmanager

from veneer_inference.ports import EngineError
from veneer_rpc.errors import (
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    Unavailable,
    VeneerError,
    Violation,
    invalid,
)

_RETRY_S = 1.0


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turns an EngineError that leaves the block into the error for the caller.

    Raises:
        VeneerError: in its place.
    """
    try:
        yield
    except EngineError as error:
        raise told(error) from error


def told(error: EngineError) -> VeneerError:
    """The error for a caller."""
    text, retry_s = str(error), error.retry_s or _RETRY_S
    match error.reason:
        case "TOO_LONG":
            return invalid(Violation("prompt", "TOO_LONG", text))
        case "REQUEST_INVALID":
            return invalid(Violation("prompt", "REQUEST_INVALID", text))
        case "SCHEMA_UNSUPPORTED":
            return invalid(Violation("sampling.json_schema", "SCHEMA_UNSUPPORTED", text))
        case "ADAPTER_INVALID":
            return FailedPrecondition("ADAPTER_INVALID", text)
        case "QUEUE_FULL":
            return ResourceExhausted("QUEUE_FULL", text, retry_after_s=retry_s)
        case "READER_TOO_SLOW":
            return ResourceExhausted("READER_TOO_SLOW", text, retry_after_s=retry_s)
        case "ENGINE_GONE":
            return Unavailable("ENGINE_GONE", "the engine ended while it answered", retry_after_s=retry_s)
        case "ADAPTER_NOT_LOADED":
            return Unavailable("ADAPTER_NOT_LOADED", "adapters crowd one another out", retry_after_s=retry_s)
    return Internal("ENGINE_FAILED", f"{error.reason}: {text}")
