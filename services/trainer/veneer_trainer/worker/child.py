"""The child's process, forked by the worker's `child_process`."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from veneer_rpc import logs
from veneer_trainer.worker.exporting.run import export
from veneer_trainer.worker.failures import failure_of
from veneer_trainer.worker.loop.calibration import measure
from veneer_trainer.worker.loop.group import train_together
from veneer_trainer.worker.loop.link import Link
from veneer_trainer.worker.messages import ExportTask, Measure, Measured, Task


def main(connections: Sequence[socket.socket], log_level: str, folder: Path, device: str) -> NoReturn:
    """Does the work that comes first over the connection, and ends the process.

    Several connections are those of as many ranks: then this process watches over them.

    It leads a session of its own, so that a signal to the worker's process group does not end it before it has written
    its checkpoint; it ends when the worker does, as `Link` hears.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides
    logs.configure(log_level, "json")  # type: ignore[arg-type]  # the worker's own setting
    if len(connections) > 1:
        from veneer_trainer.worker.rank_group import run_ranks  # torchrun's agent, which one rank does without

        run_ranks(connections, folder, device)
    link = Link(connections[0])
    try:
        match link.task:
            case Measure():
                link.send(Measured(measure(link.task).SerializeToString()))
            case ExportTask():
                export(link, link.task)
            case Task():
                train_together(link)
    except Exception as error:
        link.send(failure_of(error))
    sys.stderr.flush()
    os._exit(0)  # threads that wait for rows do not matter any more
