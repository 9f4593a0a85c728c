"""Uploads that break: what has arrived is kept whole."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from veneer.dataset.v1.dataset_service_pb2 import UploadBlobsRequest
from veneer_dataset.api import blob_calls
from veneer_dataset.api.blob_calls import BlobCalls

if TYPE_CHECKING:
    from tests.unit.conftest import Stuck


async def test_a_cancelled_upload_is_closed_once_its_thread_has_taken_the_pieces(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Upload:
        def __init__(self, *of: object) -> None: ...

        def take(self, pieces: list[object]) -> None:
            if pieces:
                stuck.work("taken")

        def close(self) -> None:
            stuck.done.append("closed")

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
    await stuck.cancel(calls.UploadBlobs(requests(), None))
    assert stuck.done == ["taken", "closed"]
