"""The sync face's loop: an interrupt may come between any two lines of the thread that waits."""

import asyncio
import contextlib
import gc
import linecache
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

import pytest

from veneer_client import _loop
from veneer_client._loop import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.stop()


class Interrupt:
    """Raises KeyboardInterrupt at the nth line that this thread runs of the loop's own file."""

    def __init__(self, nth: int) -> None:
        self.left = nth
        self.line = ""

    def __call__(self, frame: FrameType, event: str, _: object) -> Self | None:
        if frame.f_code.co_filename != _loop.__file__ or frame.f_code.co_name not in ("run", "iterate"):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.line = linecache.getline(_loop.__file__, frame.f_lineno).strip()
                raise KeyboardInterrupt
        return self


@contextmanager
def traced(interrupt: Interrupt) -> Iterator[None]:
    sys.settrace(interrupt)
    try:
        yield
    finally:
        sys.settrace(None)


def test_an_interrupt_at_any_line_closes_what_was_iterated(loop: LoopThread) -> None:
    """No line leaves a generator open, work under way or a coroutine that nobody awaits."""
    begun, closed = [], []

    async def items() -> AsyncIterator[int]:
        begun.append(1)
        try:
            yield 1
            await asyncio.sleep(0.05)  # the interrupt of a line comes while it runs
            yield 2
        finally:
            closed.append(1)

    nth = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while True:
            nth += 1
            interrupt = Interrupt(nth)
            with contextlib.suppress(KeyboardInterrupt), traced(interrupt):
                list(loop.iterate(items()))
            if interrupt.left > 0:
                break
            gc.collect()
            loop.run(asyncio.sleep, 0)
            assert len(begun) == len(closed), f"line {nth} left a generator open"
    assert nth > 20
    assert len(asyncio.all_tasks(loop._loop)) == 0


def test_an_interrupt_ends_the_work_and_not_its_waiter_alone(loop: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loop, "_CLEANUP_S", 600.0)  # so that waiting for it in vain is seen
    interrupt, nth = Interrupt(0), 0
    while interrupt.line != "return outcome.result()":
        nth += 1
        interrupt = Interrupt(nth)
        with pytest.raises(KeyboardInterrupt), traced(interrupt):
            loop.run(asyncio.sleep, 60.0)
        assert len(asyncio.all_tasks(loop._loop)) == 0, interrupt.line


def test_a_call_with_wrong_arguments_is_the_callers_error(loop: LoopThread) -> None:
    async def work(one: int) -> int:
        return one

    with pytest.raises(TypeError, match="positional argument"):
        loop.run(work)  # type: ignore[call-arg]


def test_the_end_waits_for_what_is_still_under_way() -> None:
    """As gRPC's own task of a cancelled call that takes its status."""
    loop = LoopThread()
    ended = threading.Event()

    async def status() -> None:
        await asyncio.sleep(0.1)
        ended.set()

    async def begin() -> None:
        loop.kept = asyncio.create_task(status())  # type: ignore[attr-defined]

    loop.run(begin)
    loop.stop()
    assert ended.is_set()
