"""Where the edge hands work to threads: one call, or an iterator drawn one step ahead of its reader."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final, TypeVar

_T = TypeVar("_T")
_END: Final = object()

in_thread = asyncio.to_thread


async def drawn(make: Callable[[], Iterator[_T]]) -> AsyncIterator[_T]:
    """Yields what an iterator yields that is made and driven in threads; it is closed in the end."""
    iterator = make()

    def following() -> "asyncio.Task[_T | object]":
        return asyncio.create_task(in_thread(next, iterator, _END))

    ahead = following()
    try:
        while (item := await ahead) is not _END:
            ahead = following()
            yield item  # type: ignore[misc]  # not the sentinel
    finally:
        await asyncio.wait({ahead})  # a generator cannot be closed while it runs
        if not ahead.cancelled():
            ahead.exception()  # seen here, if the reader left before it came to it
        close = getattr(iterator, "close", None)
        if close is not None:
            await in_thread(close)
