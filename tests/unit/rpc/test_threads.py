"""Work in threads: it has ended when the call that wants it ends."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING

import pytest

from veneer_rpc.threads import in_thread

if TYPE_CHECKING:
    from tests.unit.conftest import Stuck

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
async def test_a_caller_is_cancelled_once_its_thread_has_ended_however_often_it_is_told(
    stuck: Stuck, fails: bool
) -> None:
    def work() -> None:
        stuck.work("worked")
        if fails:
            raise OSError("unheard")

    async def call() -> None:
        try:
            await in_thread(work)
        finally:
            stuck.done.append("closed")

    await stuck.cancel(call())
    assert stuck.done == ["worked", "closed"]
