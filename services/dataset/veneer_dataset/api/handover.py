"""Where the edge hands the steps of an iterator to threads: all of them or those that may wait."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final, TypeVar

from veneer_rpc.threads import in_thread

_T = TypeVar("_T")
_END: Final = object()


async def drawn(make: Callable[[], Iterator[_T | None]], *, in_threads: bool = True) -> AsyncIterator[_T]:
    """Yields what an iterator yields save None; the iterator is closed in the end. Threads are one step ahead.

    Args:
        make: makes the iterator.
        in_threads: whether threads take all steps. Else the first, and that after each None: those may wait. The others
            are taken here, for to hand a little work over costs more than to do it.
    """
    iterator = make()

    def following() -> "asyncio.Task[_T | object | None]":
        return asyncio.create_task(in_thread(next, iterator, _END))

    ahead: asyncio.Task[_T | object | None] | None = following()
    try:
        while True:
            if ahead is None:
                item = next(iterator, _END)
            else:
                await asyncio.wait({ahead})  # awaited by itself it would end with a reader who leaves, its thread not
                item = ahead.result()
            if item is _END:
                return
            ahead = following() if in_threads or item is None else None
            if item is not None:
                yield item  # type: ignore[misc]  # not the sentinel
    finally:
        if ahead is not None:
            await asyncio.wait({ahead})  # a generator cannot be closed while it runs
            if not ahead.cancelled():
                ahead.exception()  # seen here, if the reader left before it came to it
        close = getattr(iterator, "close", None)
        if close is not None:
            await in_thread(close)
