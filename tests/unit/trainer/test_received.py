"""Files that are received: none is removed under a thread that works on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from veneer.trainer.v1.worker_service_pb2 import PutCheckpointRequest
from veneer_trainer.api.worker_servicer import _received

if TYPE_CHECKING:
    from tests.unit.conftest import Stuck


async def _sent(files: int) -> AsyncIterator[Any]:
    for _ in range(files):
        request = PutCheckpointRequest()
        request.file.path = "optimizer.safetensors"
        yield request


@pytest.mark.parametrize(("files", "last"), [(0, "stored"), (1, "written")])
async def test_files_are_not_removed_while_a_thread_has_them_though_the_call_be_cancelled(
    stuck: Stuck, files: int, last: str
) -> None:
    class Receiver:
        def write(self, path: str, data: bytes) -> None:
            stuck.work("written")

        def abandon(self) -> None:
            stuck.done.append("removed")

    await stuck.cancel(_received(_sent(files), Receiver(), lambda: stuck.work("stored")))
    assert stuck.done == [last, "removed"]
