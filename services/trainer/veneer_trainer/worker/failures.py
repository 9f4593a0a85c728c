"""Why work failed, from an exception."""

from __future__ import annotations

import structlog
import torch

from veneer_processing import ProcessingError
from veneer_rpc.errors import VeneerError
from veneer_trainer.worker.messages import Failed
from veneer_trainer.worker.refusal import Refused
from veneer_vlm.errors import RefusedError

_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
_log = structlog.get_logger(__name__)


def failure_of(error: Exception) -> Failed:
    """Returns what the trainer is told of an exception; one that nobody foresaw is logged."""
    if isinstance(error, Refused):
        return Failed(error.reason, error.message, error.transient)
    if isinstance(error, VeneerError):
        return Failed(error.reason, error.message, transient=False)
    if isinstance(error, RefusedError):
        return Failed("BASE_REFUSED", "; ".join(error.violations), transient=False)
    if isinstance(error, ProcessingError):
        return Failed("PROCESSING_REFUSED", str(error), transient=False)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return Failed("OUT_OF_MEMORY", f"the work needs more memory than there is: {text}", transient=False)
    _log.error("work failed", exc_info=error)
    return Failed("WORKER_ERROR", text, transient=False)
