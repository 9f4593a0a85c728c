"""Uploads that break: what has arrived is kept whole."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from veneer.dataset.v1.dataset_service_pb2 import UploadBlobsRequest
from veneer_dataset.api import blob_calls
from veneer_dataset.api.blob_calls import BlobCalls


async def test_a_cancelled_upload_is_closed_once_its_thread_has_taken_the_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    begun, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    class Upload:
        def __init__(self, *of: object) -> None: ...

        def take(self, pieces: list[object]) -> None:
            if pieces:
                loop.call_soon_threadsafe(begun.set)
                assert may_end.wait(5)
                done.append("taken")

        def close(self) -> None:
            done.append("closed")

    async def requests() -> AsyncIterator[UploadBlobsRequest]:
        data = bytes(1 << 20)
        request = UploadBlobsRequest()
        request.header.digest, request.header.size_bytes = hashlib.sha256(data).hexdigest(), len(data)
        yield request
        yield UploadBlobsRequest(data=data)
        await asyncio.Event().wait()

    monkeypatch.setattr(blob_calls, "Upload", Upload)
    monkeypatch.setattr(blob_calls, "tenant", lambda: "acme")
    calls = BlobCalls()
    calls._app = cast(Any, SimpleNamespace(blobs=None, partial=None, quota_bytes=0, stall_s=5))
    call = asyncio.create_task(calls.UploadBlobs(requests(), None))
    await begun.wait()
    call.cancel()
    await asyncio.sleep(0.05)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert done == ["taken", "closed"]
