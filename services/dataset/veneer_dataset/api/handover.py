"""Where the edge hands work to threads: one call, or the steps of an iterator, all of them or those that may wait."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final, Generic, TypeVar

_T = TypeVar("_T")
_END: Final = object()

in_thread = asyncio.to_thread


async def drawn(make: Callable[[], Iterator[_T]]) -> AsyncIterator[_T]:
    """Yields what an iterator yields that is driven in threads, one step ahead; it is closed in the end."""
    steps = _Steps(make())
    try:
        steps.begin()
        while (item := await steps.begun()) is not _END:
            steps.begin()
            yield item  # type: ignore[misc]  # not the sentinel
    finally:
        await steps.close()


async def stepped(make: Callable[[], Iterator[_T | None]]) -> AsyncIterator[_T]:
    """Yields what an iterator yields save None; it is closed in the end.

    Its first step and that after each None may wait, and are taken in a thread. All others are taken at once: to hand
    a little work over costs more than to do it.
    """
    steps = _Steps(make())
    item: _T | object | None = None
    try:
        while item is not _END:
            if item is None:
                steps.begin()
                item = await steps.begun()
            else:
                yield item  # type: ignore[misc]  # not the sentinel
                item = steps.now()
    finally:
        await steps.close()


class _Steps(Generic[_T]):
    """The steps of an iterator, one at a time; `_END` comes after the last."""

    def __init__(self, iterator: Iterator[_T]) -> None:
        self._iterator = iterator
        self._begun: asyncio.Task[_T | object] | None = None

    def begin(self) -> None:
        """Has a thread take the next step."""
        self._begun = asyncio.create_task(in_thread(next, self._iterator, _END))

    async def begun(self) -> _T | object:
        """What the step gave that was begun."""
        assert self._begun is not None  # noqa: S101  # for the type checker
        await asyncio.wait({self._begun})  # a reader who leaves would end it, if it were awaited by itself
        return self._begun.result()

    def now(self) -> _T | object:
        """Takes the next step."""
        return next(self._iterator, _END)

    async def close(self) -> None:
        """Closes the iterator once its step under way is done: a generator cannot be closed while it runs."""
        if self._begun is not None:
            await asyncio.wait({self._begun})
            if not self._begun.cancelled():
                self._begun.exception()  # seen here, if the reader left before it came to it
        close = getattr(self._iterator, "close", None)
        if close is not None:
            await in_thread(close)
