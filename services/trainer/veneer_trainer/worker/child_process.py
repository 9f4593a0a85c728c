"""The child that computes: started, spoken to, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import Sequence
from pathlib import Path

from veneer_rpc import forks
from veneer_trainer.worker.messages import ExportTask, Measure, Task, ToChild, ToParent, frame, read_from_child


def get_ready(threads: int) -> None:
    """Starts the process that children are forked from: it has imported all that they need, so that they begin at once.

    Args:
        threads: that they compute with.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    forks.get_ready("veneer_trainer.worker.child", __name__)


class ChildProcess:
    """A running child; `start` makes one."""

    def __init__(self, process: forks.Child, lines: Sequence[tuple[StreamReader, StreamWriter]]) -> None:
        self._process = process
        self._lines = lines

    @classmethod
    async def start(cls, task: Task | Measure | ExportTask, log_level: str, ranks: int = 1) -> ChildProcess:
        """Starts a child on a task; it ends when this process does.

        Args:
            task: what it is for.
            log_level: of its log.
            ranks: processes that train together; several are its own children.
        """
        folder, device = (task.folder, task.device) if isinstance(task, Task) else ("", "")
        pairs = [socket.socketpair() for _ in range(ranks)]
        with contextlib.ExitStack() as stack:
            theirs = [stack.enter_context(there) for _, there in pairs]
            process = await forks.Child.start(_child, theirs, log_level, folder, device, daemon=ranks == 1)
        child = cls(process, [await asyncio.open_unix_connection(sock=ours) for ours, _ in pairs])
        child.send(task)
        return child

    def send(self, message: ToChild) -> None:
        """Sends a message, to each of its ranks; one to a child that has ended is lost."""
        for _, writer in self._lines:
            if not writer.is_closing():
                writer.write(frame(message))

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self._lines)

    async def receive(self, rank: int = 0) -> ToParent | None:
        """Returns a rank's next message; None when it has ended."""
        return await read_from_child(self._lines[rank][0])

    def kill(self) -> None:
        """Ends it at once, its ranks too."""
        self._process.kill()

    async def ended(self) -> int:
        """Waits for its end and returns its exit status, negative for a signal."""
        status = await self._process.ended()
        for _, writer in self._lines:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        return status


def _child(connections: Sequence[socket.socket], log_level: str, folder: str, device: str) -> None:
    from veneer_trainer.worker.child import main  # it takes torch along, which this process does without

    main(connections, log_level, Path(folder), device)
