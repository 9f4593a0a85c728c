"""The jobs of one training process, each with its own line to it."""

from __future__ import annotations

import asyncio
import signal

from veneer_trainer.worker.child_process import ChildProcess
from veneer_trainer.worker.messages import Delegation, Leave, OfJob, Stop, Task, Told


class Crew:
    """Jobs that train in one process. It starts with the first of them and ends with the last.

    Args:
        log_level: of the process.
        ranks: processes that it is made of; several train one job alone.
    """

    def __init__(self, log_level: str, ranks: int = 1) -> None:
        self._log_level = log_level
        self._ranks = ranks
        self._child: ChildProcess | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._seats: dict[str, Seat] = {}
        self._coming = asyncio.Lock()  # the first starts the process, the others wait for it

    async def join(self, task: Task) -> Seat:
        """Has a job trained; `leave` its seat in the end."""
        async with self._coming:
            seat = Seat(self, task.folder)
            if self._child is None:
                self._child = await ChildProcess.start(task, self._log_level, self._ranks)
                self._hearing = asyncio.create_task(self._hear(self._child))
            else:
                self._child.send(task)
            self._seats[task.folder] = seat
        return seat

    def send(self, message: Stop | Leave | Delegation) -> None:
        """Sends a message; one to a process that has ended is lost."""
        if self._child is not None:
            self._child.send(message)

    async def leave(self, folder: str) -> None:
        """Ends a job's part, and the process with the last."""
        if self._seats.pop(folder, None) is None:
            return
        if self._seats:
            self.send(Leave(folder))
        elif self._child is not None and self._hearing is not None:
            self._child.kill()
            self._child = None  # who joins from now on gets another
            await asyncio.wait([self._hearing])  # which goes on to its end where the waiting is cut short

    async def _hear(self, child: ChildProcess) -> None:
        await asyncio.gather(*(self._hear_rank(child, rank) for rank in range(child.ranks)))
        status = await child.ended()
        if self._child is not child:
            return
        self._child = None
        for seat in self._seats.values():
            seat.status = status
            seat.heard.put_nowait(None)

    async def _hear_rank(self, child: ChildProcess, rank: int) -> None:
        while (message := await child.receive(rank)) is not None:
            if isinstance(message, Told) and message.folder in self._seats:
                self._seats[message.folder].heard.put_nowait(message.message)


class Seat:
    """One job's line to the process.

    Attributes:
        heard: what the process has said, and None in the end.
        status: the process's exit status once it has ended, negative for a signal.
    """

    def __init__(self, crew: Crew, folder: str) -> None:
        self._crew = crew
        self._folder = folder
        self.heard: asyncio.Queue[OfJob | None] = asyncio.Queue()
        self.status = -signal.SIGKILL

    def stop(self) -> None:
        """Has the job stop after the step, with a checkpoint."""
        self._crew.send(Stop(self._folder))

    def renew(self, delegation: str) -> None:
        """Passes on a credential."""
        self._crew.send(Delegation(delegation))

    async def leave(self) -> None:
        """Ends the job at once where it is alone, after the step else; nothing more is heard of it."""
        self.heard.put_nowait(None)
        await self._crew.leave(self._folder)
