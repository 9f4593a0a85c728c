"""Work in threads that has ended when the call that wants it ends."""

import asyncio
import contextlib
import contextvars
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def in_thread(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Does work in a thread of the loop's own.

    Unlike `asyncio.to_thread`, which leaves its thread alone when the caller is cancelled, this waits for it: what the
    caller then closes or removes is not closed or removed under a thread that works on it.
    """
    context = contextvars.copy_context()
    working = asyncio.get_running_loop().run_in_executor(None, partial(context.run, work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({working})
        if not working.cancelled():
            working.exception()  # seen here: nobody is there to hear it
        raise
