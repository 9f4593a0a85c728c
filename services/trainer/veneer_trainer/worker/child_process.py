"""The child that computes: started, spoken to, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
from asyncio import StreamReader, StreamWriter
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess

from veneer_trainer.worker.messages import ExportTask, Measure, Task, ToChild, ToParent, frame, read_from_child

_FORKS = multiprocessing.get_context("forkserver")


def get_ready(threads: int) -> None:
    """Starts the process that children are forked from: it has imported all that they need, so that they begin at once.

    Args:
        threads: that they compute with.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _FORKS.set_forkserver_preload(["veneer_trainer.worker.child", __name__])
    forkserver.ensure_running()


class ChildProcess:
    """A running child; `start` makes one."""

    def __init__(self, process: ForkServerProcess, reader: StreamReader, writer: StreamWriter) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._over = asyncio.Event()
        asyncio.get_running_loop().add_reader(process.sentinel, self._over.set)

    @classmethod
    async def start(cls, task: Task | Measure | ExportTask, log_level: str) -> ChildProcess:
        """Starts a child on a task; it ends when this process does."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = _FORKS.Process(target=_child, args=(theirs, log_level))
            await asyncio.to_thread(process.start)  # waits for the imports
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        child = cls(process, reader, writer)
        child.send(task)
        return child

    def send(self, message: ToChild) -> None:
        """Sends a message; one to a child that has ended is lost."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> ToParent | None:
        """Returns its next message; None when it has ended."""
        return await read_from_child(self._reader)

    def kill(self) -> None:
        """Ends it at once."""
        # Not by `Process.kill`, which spares a child whose server has died.
        if not self._writer.is_closing() and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Waits for its end and returns its exit status, negative for a signal."""
        await self._over.wait()
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        return self._process.exitcode or 0


def _child(connection: socket.socket, log_level: str) -> None:
    from veneer_trainer.worker.child import main  # it takes torch along, which this process does without

    main(connection, log_level)
