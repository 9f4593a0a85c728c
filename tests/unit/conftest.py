"""What unit tests of several parts share."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest


class Stuck:
    """Work that a thread cannot get on with until the call that wants it was cancelled.

    Attributes:
        done: what was done, in order; tests add to it.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self._may_end = threading.Event()
        self._begun = threading.Event()

    def work(self, what: str) -> None:
        """The work, in its thread."""
        self._begun.set()
        assert self._may_end.wait(5)
        self.done.append(what)

    async def cancel(self, call: Coroutine[Any, Any, Any]) -> None:
        """Has a call begin the work, cancels it, lets the work end, and sees that the call ends only then."""
        calling = asyncio.create_task(call)
        assert await asyncio.to_thread(self._begun.wait, 5)
        for _ in range(3):
            calling.cancel()
            await asyncio.sleep(0.01)
        assert not calling.done()
        self._may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await calling


@pytest.fixture
def stuck() -> Stuck:
    return Stuck()
