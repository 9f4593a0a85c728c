"""The child that computes: started, spoken to, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import DEVNULL, Process

from veneer_trainer.worker.messages import ExportTask, Measure, Task, ToChild, ToParent, frame, read_from_child


class ChildProcess:
    """A running child; `start` makes one."""

    def __init__(self, process: Process, reader: StreamReader, writer: StreamWriter) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, task: Task | Measure | ExportTask, log_level: str) -> ChildProcess:
        """Starts a child on a task.

        It leads a session of its own, so that a signal to the worker's process group does not end it before it has
        written its checkpoint; it ends when the worker does.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            environment = os.environ | {"OMP_NUM_THREADS": str(task.threads)}
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "veneer_trainer.worker.child", str(theirs.fileno()), log_level),
                stdin=DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=environment,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        child = cls(process, reader, writer)
        child.send(task)
        return child

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def send(self, message: ToChild) -> None:
        """Sends a message; one to a child that has ended is lost."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> ToParent | None:
        """Returns its next message; None when it has ended."""
        return await read_from_child(self._reader)

    def kill(self) -> None:
        """Ends it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> int:
        """Waits for its end and returns its exit status, negative for a signal."""
        status = await self._process.wait()
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        return status
