"""The sync face: an event loop in a background thread, and methods that wait for what runs on it.

A sync class names each method of its async twin once; types, parameters and docstrings are the twin's:

    class Jobs(Face[AsyncJobs]):
        get = Blocking(AsyncJobs.get)
        watch = Iterating(AsyncJobs.watch)
"""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, wait
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

_A = TypeVar("_A")
_A_co = TypeVar("_A_co", covariant=True)
_P = ParamSpec("_P")
_R = TypeVar("_R")
_CLEANUP_S = 5.0


class LoopThread:
    """A running event loop of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="veneer-client", daemon=True)
        self._thread.start()

    def run(self, work: Callable[_P, Coroutine[Any, Any, _R]], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Runs a coroutine function to its end on the loop; returns the result. An interrupt here cancels it there.

        The interrupt may come between any two lines, so that the coroutine is made on the loop, where none comes.
        """
        outcome: Future[_R] = Future()
        begun: list[asyncio.Task[_R]] = []

        async def whole() -> _R:
            return await work(*args, **kwargs)

        def begin() -> None:
            begun.append(self._loop.create_task(whole()))
            begun[0].add_done_callback(functools.partial(_settle, outcome))

        def abandon() -> None:  # the loop keeps the order of what it is told: what has not begun by now never will
            if begun:
                begun[0].cancel()
            else:
                outcome.set_exception(CancelledError())

        try:
            self._loop.call_soon_threadsafe(begin)
            return outcome.result()
        except BaseException:
            self._loop.call_soon_threadsafe(abandon)
            wait([outcome], _CLEANUP_S)  # a generator that still runs could not be closed
            raise

    def iterate(self, items: AsyncIterator[_R]) -> Iterator[_R]:
        """Yields what an async generator yields; closing the iterator closes the generator."""
        generator = aiter(items)
        try:
            while True:
                try:
                    item = self.run(_next, generator)
                except StopAsyncIteration:
                    return
                yield item
        finally:
            close = getattr(generator, "aclose", None)
            if close is not None and not self._loop.is_closed():
                self.run(close)

    def stop(self) -> None:
        """Ends the loop and its thread, and the iterators that were left half read."""
        self.run(self._loop.shutdown_asyncgens)
        self.run(_others_ended)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(items: AsyncIterator[_R]) -> _R:
    return await anext(items)


def _settle(outcome: Future[_R], task: asyncio.Task[_R]) -> None:
    if task.cancelled():
        outcome.set_exception(CancelledError())
    elif error := task.exception():
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


async def _others_ended() -> None:
    """Waits for what gRPC has under way: a call that was cancelled still takes its status."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=_CLEANUP_S)


class Face(Generic[_A_co]):
    """What a sync class stands on: its async twin, and the loop that the twin runs on."""

    def __init__(self, twin: _A_co, loop: LoopThread) -> None:
        self._twin = twin
        self._loop = loop


class Blocking(Generic[_A, _P, _R]):
    """A coroutine method of the twin, as a method that waits for it."""

    def __init__(self, method: Callable[Concatenate[_A, _P], Coroutine[Any, Any, _R]]) -> None:
        self._method = method
        functools.update_wrapper(self, method)  # type: ignore[arg-type]  # a descriptor that passes as its method

    def __get__(self, face: Face[_A], owner: type) -> Callable[_P, _R]:
        """Returns the method, bound to its sync object."""

        @functools.wraps(self._method)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            return face._loop.run(self._method, face._twin, *args, **kwargs)

        return call


class Iterating(Generic[_A, _P, _R]):
    """An async generator method of the twin, as a method that returns an iterator."""

    def __init__(self, method: Callable[Concatenate[_A, _P], AsyncIterator[_R]]) -> None:
        self._method = method
        functools.update_wrapper(self, method)  # type: ignore[arg-type]  # as in Blocking

    def __get__(self, face: Face[_A], owner: type) -> Callable[_P, Iterator[_R]]:
        """Returns the method, bound to its sync object."""

        @functools.wraps(self._method)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> Iterator[_R]:
            return face._loop.iterate(self._method(face._twin, *args, **kwargs))

        return call
