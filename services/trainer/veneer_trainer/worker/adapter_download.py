"""An adapter version that work starts from, on its way from the registry to the worker's disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from veneer.trainer.v1 import adapter_service_pb2, adapter_service_pb2_grpc
from veneer_rpc.threads import in_thread
from veneer_trainer.worker import folders
from veneer_trainer.worker.attempt import Attempt


async def fetch(
    adapters: adapter_service_pb2_grpc.AdapterServiceAsyncStub, attempt: Attempt, tenant: str, name: str, folder: Path
) -> None:
    """Downloads a version's PEFT folder into a folder of its own; the registry checks each file's digest as it reads.

    Raises:
        Abandoned: the attempt is not ours any more.
        VeneerError: the registry refuses.
    """
    request = adapter_service_pb2.DownloadAdapterVersionRequest(name=name, tenant=tenant)

    async def download(**how: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        async for piece in adapters.DownloadAdapterVersion(request, **how):  # type: ignore[arg-type]  # as Attempt.call says
            await in_thread(folders.append, folder, piece.path, piece.data)

    await attempt.call(download, timeout_s=None)
