"""Starts the processes of a cluster in order, keeps them running, and stops them in reverse."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import groupby

from veneer_cluster.child import Child
from veneer_cluster.folder import ClusterError, ClusterState, Folder
from veneer_cluster.programs import Program

START_TIMEOUT_S = 600.0  # a large base is read from a slow disk
STOP_GRACE_S = 30.0
SAMPLE_S = 1.0
FIRST_RESTART_S = 0.5
LONGEST_RESTART_S = 30.0
STABLE_S = 60.0
_SHOWN_LOG_LINES = 12


class Launcher:
    """A cluster's processes.

    Args:
        folder: theirs; the caller holds its lock.
        programs: in any order; their stages say which waits for which.
        model: the base's name, for the state file.
        base: its directory.
        grace_s: what each process gets to end after SIGTERM.
    """

    def __init__(
        self,
        folder: Folder,
        programs: Sequence[Program],
        model: str,
        base: str,
        grace_s: float = STOP_GRACE_S,
    ) -> None:
        self._folder = folder
        self._model = model
        self._base = base
        self._grace_s = grace_s
        self._children = [Child(program, folder.log(program.name)) for program in programs]
        self._ready = False
        self._stop = asyncio.Event()

    async def run(self, on_ready: Callable[[ClusterState], None]) -> None:
        """Runs the cluster until SIGTERM, SIGINT or SIGHUP; all its processes have ended when this returns.

        Raises:
            ClusterError: a process ended before it was ready, or was not ready in time.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        reporting = asyncio.create_task(self._report())
        starting = asyncio.create_task(self._start())
        stopped = asyncio.create_task(self._stop.wait())
        keepers: list[asyncio.Task[None]] = []
        try:
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                self._ready = True
                state = self._write_state()
                on_ready(state)
                keepers = [asyncio.create_task(self._keep(child)) for child in self._children]
                await stopped
        finally:
            tasks = (starting, stopped, reporting, *keepers)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._stop_all()

    async def _start(self) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                for _, stage in groupby(self._children, lambda child: child.program.stage):
                    children = list(stage)
                    for child in children:
                        await child.start()
                    await asyncio.gather(*map(self._await_ready, children))
        except TimeoutError:
            late = ", ".join(child.program.name for child in self._children if child.state == "starting")
            raise ClusterError(f"{late} did not get ready within {START_TIMEOUT_S:g} s: see `veneer logs`") from None

    async def _await_ready(self, child: Child) -> None:
        if not await child.wait_ready():
            name, code = child.program.name, await child.wait()
            raise ClusterError(
                f"{name} ended with status {code} before it was ready. The end of its log:\n"
                f"{child.last_lines(_SHOWN_LOG_LINES)}"
            )

    async def _keep(self, child: Child) -> None:
        """Starts a process that ended again, later each time, until it has run for a while."""
        wait_s = FIRST_RESTART_S
        while True:
            started_s = time.monotonic()
            code = await child.wait()
            if time.monotonic() - started_s >= STABLE_S:
                wait_s = FIRST_RESTART_S
            child.state = "restarting"
            child.restarts += 1
            self._write_state()
            say(f"{child.program.name} ended with status {code}; it is started again in {wait_s:g} s")
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_RESTART_S)
            await child.start()
            if await child.wait_ready():
                say(f"{child.program.name} runs again, pid {child.pid}")

    async def _report(self) -> None:
        while True:
            self._write_state()
            await asyncio.sleep(SAMPLE_S)

    def _write_state(self) -> ClusterState:
        processes = [child.snapshot() for child in self._children]
        state = ClusterState(os.getpid(), self._model, self._base, self._ready, processes)
        self._folder.write_state(state)
        return state

    async def _stop_all(self) -> None:
        self._ready = False
        by_stage = groupby(reversed(self._children), lambda child: child.program.stage)
        for children in [list(stage) for _, stage in by_stage]:
            await asyncio.gather(*(child.stop(self._grace_s) for child in children))
        with contextlib.suppress(OSError):  # the folder may be gone
            self._write_state()


def say(text: str) -> None:
    """Prints a line of the launcher's own log."""
    print(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {text}", file=sys.stderr, flush=True)
