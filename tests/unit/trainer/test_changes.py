"""How servicers wait for changes of work."""

import asyncio

import pytest

from veneer_trainer.api.changes import changed


async def test_a_cancel_is_heard_though_the_change_comes_with_it() -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(changed(event, 60))
    for _ in range(3):
        await asyncio.sleep(0)
    event.set()
    waiting.cancel()  # a worker that leaves as work comes: else its poll would take a lease for nobody
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_it_is_time_to_look_at_the_latest_when_said() -> None:
    await changed(asyncio.Event(), 0.01)
