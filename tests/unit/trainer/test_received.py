"""Files that are received: none is removed under a thread that works on it."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from veneer.trainer.v1.worker_service_pb2 import PutCheckpointRequest
from veneer_trainer.api.worker_servicer import _received


async def _sent(files: int) -> AsyncIterator[Any]:
    for _ in range(files):
        request = PutCheckpointRequest()
        request.file.path = "optimizer.safetensors"
        yield request


@pytest.mark.parametrize(("files", "last"), [(0, "stored"), (1, "written")])
async def test_files_are_not_removed_while_a_thread_has_them_though_the_call_be_cancelled(
    files: int, last: str
) -> None:
    done: list[str] = []
    begun, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work(what: str) -> None:
        loop.call_soon_threadsafe(begun.set)
        assert may_end.wait(5)
        done.append(what)

    class Receiver:
        def write(self, path: str, data: bytes) -> None:
            work("written")

        def abandon(self) -> None:
            done.append("removed")

    call = asyncio.create_task(_received(_sent(files), Receiver(), lambda: work("stored")))
    await begun.wait()
    call.cancel()
    await asyncio.sleep(0.05)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert done == [last, "removed"]
