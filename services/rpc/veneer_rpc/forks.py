"""Children forked from a process that has imported what they need: they begin at once, not after seconds."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess

from veneer_rpc.threads import in_thread

_FORKS = multiprocessing.get_context("forkserver")


def get_ready(*modules: str) -> None:
    """Starts the process that this one's children are forked from, unless it runs; it ends with this one.

    Args:
        modules: that it imports before the first child. They may start no thread.
    """
    _FORKS.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


class Child:
    """A running child; `start` makes one. Used from one event loop."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self._pid = process.pid or 0  # it has been started
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(process.sentinel, self._ended)

    @classmethod
    async def start(cls, target: Callable[..., None], *arguments: object, daemon: bool = True) -> Child:
        """Starts a child, once the modules are imported.

        Args:
            target: what it runs, a function of a module.
            arguments: that it is called with; sockets come as copies.
            daemon: ended when this process ends in order; such a child starts none by multiprocessing itself.
        """
        process = _FORKS.Process(target=target, args=arguments, daemon=daemon)
        await in_thread(process.start)
        return cls(process)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._pid

    def kill(self) -> None:
        """Ends it at once, and its group if it leads one."""
        # Not by `Process.kill`, which spares a child whose server has died.
        if not self._over.is_set():
            for kill in (os.killpg, os.kill):  # it may not lead a group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(self._pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Waits for its end and returns its exit status, negative for a signal."""
        await self._over.wait()
        return self._process.exitcode or 0

    def _ended(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._over.set()
