"""Work in threads: it has ended when the call that wants it ends."""

import asyncio
import contextvars
import threading

import pytest

from veneer_rpc.threads import in_thread

_TENANT = contextvars.ContextVar[str]("tenant")


async def test_result_error_and_context_come_through() -> None:
    def fails() -> None:
        raise KeyError("it")

    _TENANT.set("ours")
    assert await in_thread(int, "12", base=3) == 5
    assert await in_thread(_TENANT.get) == "ours"
    with pytest.raises(KeyError, match="it"):
        await in_thread(fails)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_caller_is_cancelled_once_its_thread_has_ended_however_often_it_is_told(fails: bool) -> None:
    done: list[str] = []
    begun, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert may_end.wait(5)
        done.append("worked")
        if fails:
            raise OSError("unheard")

    async def call() -> None:
        try:
            await in_thread(work)
        finally:
            done.append("closed")

    calling = asyncio.create_task(call())
    await begun.wait()
    for _ in range(3):
        calling.cancel()
        await asyncio.sleep(0.01)
    assert not calling.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert done == ["worked", "closed"]
