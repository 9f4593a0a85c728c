"""Iterators that are drawn ahead of their reader, in threads or where they may not wait."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from veneer_dataset.api.handover import drawn


@pytest.mark.parametrize("in_threads", [True, False])
async def test_everything_comes_in_order_and_none_is_left_out(in_threads: bool) -> None:
    threads = []

    def some() -> Iterator[int | None]:
        for item in (None, 1, 2, None, 3):
            threads.append(threading.current_thread() is threading.main_thread())
            yield item

    assert [item async for item in drawn(some, in_threads=in_threads)] == [1, 2, 3]
    assert threads == ([False] * 5 if in_threads else [False, False, True, True, False])


async def test_an_error_reaches_the_reader() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("x")

    reader = drawn(broken, in_threads=False)
    assert await anext(reader) == 1
    with pytest.raises(KeyError):
        await anext(reader)


async def test_a_reader_who_leaves_in_mid_step_leaves_nothing_open() -> None:
    go, closed = threading.Event(), list[bool]()

    def slow() -> Iterator[int]:
        try:
            yield 1
            go.wait(10)
            yield 2
        finally:
            closed.append(go.is_set())

    async def read() -> None:
        async for _ in drawn(slow):
            pass

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.1)  # it waits for the second step
    asyncio.get_running_loop().call_later(0.1, go.set)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert closed == [True]  # after the step, for a generator cannot be closed while it runs
