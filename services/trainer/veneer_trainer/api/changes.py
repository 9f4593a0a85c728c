"""How servicers hear that work has changed: wake-ups on the event loop, called for from any thread."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

WAITING_WORK = ""
"""What workers wait for, in the place of a uid: that there is work to take."""

REGISTRY = "registry"
"""What replicas wait for: that an adapter has changed."""


class Changes:
    """Wakes those who wait for a piece of work when it changes.

    Args:
        loop: where the waiting is done.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiters: dict[str, set[asyncio.Event]] = {}

    def notify(self, uid: str) -> None:
        """Wakes those who wait for a piece of work, by its uid; for threads."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, uid)

    def _wake(self, uid: str) -> None:
        for event in self._waiters.get(uid, ()):
            event.set()

    @contextmanager
    def of(self, uid: str) -> Iterator[asyncio.Event]:
        """Yields an event of one's own that is set at each change; clear it before looking."""
        event, waiters = asyncio.Event(), self._waiters.setdefault(uid, set())
        waiters.add(event)
        try:
            yield event
        finally:
            waiters.discard(event)
            if not waiters and self._waiters.get(uid) is waiters:
                del self._waiters[uid]


async def changed(event: asyncio.Event, timeout_s: float) -> None:
    """Waits for a change, or until it is time to look anyway."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
