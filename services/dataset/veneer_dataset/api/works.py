"""Versions in the making: bounded in number, joined by request id, ended when nobody waits for them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from veneer_dataset.domain.freezing import Freezer, Order, Work
from veneer_dataset.domain.progress import Position
from veneer_dataset.domain.versions import DatasetVersion
from veneer_rpc.errors import ResourceExhausted
from veneer_rpc.idempotency import RequestKey, check_same_body
from veneer_rpc.threads import in_thread

_PROGRESS_S = 0.5


@dataclass(slots=True)
class Running:
    """A work and who waits for it."""

    work: Work
    key: RequestKey | None
    body_sha256: bytes
    done: "asyncio.Future[DatasetVersion]" = field(init=False)
    listeners: int = 0


class Works:
    """Runs works in threads of their own.

    Args:
        freezer: does them.
        at_once: how many run at once; others wait.
        most: how many may run or wait.
    """

    def __init__(self, freezer: Freezer, at_once: int, most: int) -> None:
        self._freezer = freezer
        self._threads = ThreadPoolExecutor(at_once, "versions")
        self._most = most
        self._running: list[Running] = []

    def joined(self, key: RequestKey, body_sha256: bytes) -> Running | None:
        """The work under way with a request's id.

        Raises:
            AlreadyExists: its body is another one.
        """
        for each in self._running:
            if each.key == key:
                check_same_body(key, each.body_sha256, body_sha256)
                return each
        return None

    def start(
        self,
        order: Order,
        key: RequestKey | None,
        body_sha256: bytes,
        remember: Callable[[DatasetVersion], None],
    ) -> Running:
        """Starts a work; `remember` is called in its thread when it has succeeded.

        Raises:
            ResourceExhausted: too many are under way.
        """
        if len(self._running) >= self._most:
            raise ResourceExhausted(
                "TOO_MANY_VERSIONS",
                f"{self._most} versions are being made, which is this server's limit",
                retry_after_s=10,
            )
        running = Running(Work(order), key, body_sha256)

        def run() -> DatasetVersion:
            version = self._freezer.run(running.work)
            remember(version)
            return version

        running.done = asyncio.get_running_loop().run_in_executor(self._threads, run)
        self._running.append(running)
        running.done.add_done_callback(lambda _: self._forget(running))
        return running

    async def positions(self, running: Running) -> AsyncIterator[Position]:
        """Yields how far a work is, twice a second, until it is done."""
        running.listeners += 1
        try:
            while not running.done.done():
                yield running.work.progress.position
                await asyncio.wait({running.done}, timeout=_PROGRESS_S)
        except BaseException:
            await self.leave(running)
            raise

    async def leave(self, running: Running) -> None:
        """Stops waiting for a work that `positions` was read of; the last one to leave closes it."""
        running.listeners -= 1
        if running.listeners:
            return
        if running.done.done():
            await in_thread(running.work.close)
        elif running.key is None:
            running.work.progress.cancel()

    def stop(self) -> None:
        """Ends all works at their next report."""
        for each in self._running:
            each.work.progress.cancel()
        self._threads.shutdown(cancel_futures=True)

    def _forget(self, running: Running) -> None:
        self._running.remove(running)
        if not running.done.cancelled():
            running.done.exception()  # told to who waits, if anybody does
        if not running.listeners:
            running.work.close()
