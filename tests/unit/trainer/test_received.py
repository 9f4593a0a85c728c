"""Files that are received: none is removed under a thread that works on it."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from veneer_trainer.api.worker_servicer import _received


async def _nothing() -> AsyncIterator[Any]:
    for each in ():
        yield each


async def test_files_are_not_removed_while_they_are_stored_for_a_call_that_was_cancelled() -> None:
    done: list[str] = []
    begun, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    class Receiver:
        def write(self, path: str, data: bytes) -> None:
            raise AssertionError

        def abandon(self) -> None:
            done.append("removed")

    def stored() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert may_end.wait(5)
        done.append("stored")

    call = asyncio.create_task(_received(_nothing(), Receiver(), lambda: asyncio.to_thread(stored)))
    await begun.wait()
    call.cancel()
    await asyncio.sleep(0.05)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert done == ["stored", "removed"]
