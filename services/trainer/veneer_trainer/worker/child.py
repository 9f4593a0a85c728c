"""The child's process: `python -m veneer_trainer.worker.child FD LOG_LEVEL`, started by the worker alone."""

from __future__ import annotations

import os
import signal
import socket
import sys

import structlog
import torch

from veneer_processing import ProcessingError
from veneer_rpc import logs
from veneer_rpc.errors import VeneerError
from veneer_rpc.parent import die_with_parent
from veneer_trainer.worker.exporting.run import export
from veneer_trainer.worker.loop.calibration import measure
from veneer_trainer.worker.loop.link import Link
from veneer_trainer.worker.loop.run import train
from veneer_trainer.worker.messages import ExportTask, Failed, Measure, Measured, Task
from veneer_trainer.worker.refusal import Refused
from veneer_vlm.errors import RefusedError

_log = structlog.get_logger(__name__)
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def main() -> int:
    """Runs the process; returns its exit code."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides
    logs.configure(sys.argv[2], "json")  # type: ignore[arg-type]  # the worker's own setting
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    try:
        match link.task:
            case Measure():
                link.send(Measured(measure(link.task).SerializeToString()))
            case ExportTask():
                export(link, link.task)
            case Task():
                train(link, link.task)
    except Exception as error:
        failed = failure_of(error)
        if failed.reason == "WORKER_ERROR":
            _log.exception("work failed")
        link.send(failed)
    sys.stderr.flush()
    os._exit(0)  # threads that wait for rows do not matter any more


def failure_of(error: Exception) -> Failed:
    """Returns what the trainer is told of an exception."""
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
    return Failed("WORKER_ERROR", text, transient=False)


if __name__ == "__main__":
    sys.exit(main())
