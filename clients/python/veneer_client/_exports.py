"""Exports: a version as a model that stands alone, with its certificate."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.trainer.v1.adapter_service_pb2 import (
    CancelExportRequest,
    DeleteExportRequest,
    DownloadExportRequest,
    ExportAdapterVersionRequest,
    GetExportRequest,
    ListExportsRequest,
)
from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceStub
from veneer.trainer.v1.export_pb2 import Export, ExportFormat, ExportSpec
from veneer.trainer.v1.model_pb2 import Dtype
from veneer.trainer.v1.training_job_pb2 import JobState
from veneer_client import _files
from veneer_client._calls import Connection
from veneer_client._errors import FolderError
from veneer_client._names import full, version
from veneer_client._work import last, succeeded

if TYPE_CHECKING:  # the generated code has it in its type stubs alone
    from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceAsyncStub

FORMATS = {
    "merged-fp32": (ExportFormat.EXPORT_FORMAT_MERGED, Dtype.DTYPE_FLOAT32),
    "merged-bf16": (ExportFormat.EXPORT_FORMAT_MERGED, Dtype.DTYPE_BFLOAT16),
    "onnx-fp32": (ExportFormat.EXPORT_FORMAT_ONNX, Dtype.DTYPE_FLOAT32),
    "onnx-int8": (ExportFormat.EXPORT_FORMAT_ONNX, Dtype.DTYPE_INT8),
    "openvino-fp32": (ExportFormat.EXPORT_FORMAT_OPENVINO, Dtype.DTYPE_FLOAT32),
    "openvino-int8": (ExportFormat.EXPORT_FORMAT_OPENVINO, Dtype.DTYPE_INT8),
}
"""Forms by the name that people use."""

_LOOK_S, _LONGEST_LOOK_S = 0.2, 2.0
_ENDED = {
    JobState.JOB_STATE_SUCCEEDED,
    JobState.JOB_STATE_FAILED,
    JobState.JOB_STATE_CANCELLED,
    JobState.JOB_STATE_DEAD_LETTERED,
}


class AsyncExports:
    """Exports."""

    def __init__(self, trainer: Connection) -> None:
        self._trainer = trainer

    def _stub(self) -> "AdapterServiceAsyncStub":
        return self._trainer.stub(AdapterServiceStub)

    async def create(
        self, adapter: str, format: str, *, split: str = "", force: bool = False, request_id: str = ""
    ) -> Export:
        """Queues an export.

        Args:
            adapter: a version, such as `digits@3`.
            format: one of FORMATS, such as `merged-fp32`.
            split: of the adapter's data, that the exported model is checked on. Default: `test`, else another.
            force: keep it even when it is not equal enough; its certificate says so.
            request_id: a UUID of yours. Default: made here.

        Raises:
            ValueError: there is no such format.
        """
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, was {format!r}")
        form, dtype = FORMATS[format]
        spec = ExportSpec(
            adapter_version=version("adapters", adapter), format=form, dtype=dtype, check_split=split, force=force
        )
        request = ExportAdapterVersionRequest(spec=spec, request_id=request_id)
        return await self._trainer.change(self._stub().ExportAdapterVersion, request)

    async def get(self, name: str) -> Export:
        """Returns an export."""
        return await self._trainer.read(self._stub().GetExport, GetExportRequest(name=full("exports", name)))

    async def list(self, *, adapter: str = "") -> AsyncIterator[Export]:
        """Yields exports, newest first; only those of one version, such as `digits@3`, when given."""
        request = ListExportsRequest(adapter_version=version("adapters", adapter) if adapter else "")
        async for item in self._trainer.pages(self._stub().ListExports, request, lambda page: page.exports):
            yield item

    async def watch(self, name: str) -> AsyncIterator[Export]:
        """Yields an export as it is now, and whenever it has changed, until it has ended."""
        before, wait_s = None, _LOOK_S
        while True:
            export = await self.get(name)
            if export != before:
                before, wait_s = export, _LOOK_S
                yield export
            if export.state in _ENDED:
                return
            await asyncio.sleep(wait_s)
            wait_s = min(1.5 * wait_s, _LONGEST_LOOK_S)

    async def wait(self, name: str) -> Export:
        """Waits for an export and returns it when it succeeded.

        Raises:
            WorkFailed: it ended in another way.
        """
        return succeeded(await last(self.watch(name)))

    async def download(self, name: str, folder: str | Path) -> Path:
        """Writes an export's files into a new folder, and returns it.

        The folder appears once every file is there with its digest: what was broken off is never taken for whole.

        Args:
            name: the export.
            folder: must not exist, or be empty.

        Raises:
            FolderError: something is there already.
            DataLoss: a file is not what was announced.
        """
        target = Path(folder)
        if await asyncio.to_thread(is_taken, target):
            raise FolderError(f"{target} is there already: an export gets a folder of its own")
        export = await self.get(name)

        def stream(paths: Sequence[str], offset: int, timeout_s: float) -> AsyncIterator[_files.Piece]:
            request = DownloadExportRequest(name=export.name, paths=paths, offset_bytes=offset)
            return self._trainer.stream(self._stub().DownloadExport, request, timeout_s)

        target.parent.mkdir(parents=True, exist_ok=True)
        incoming = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            await _files.download(export.files, incoming, stream)
            await asyncio.to_thread(_put, incoming, target)
        finally:
            await asyncio.to_thread(shutil.rmtree, incoming, ignore_errors=True)
        return target

    async def cancel(self, name: str) -> Export:
        """Stops an export for good."""
        return await self._trainer.change(self._stub().CancelExport, CancelExportRequest(name=full("exports", name)))

    async def delete(self, name: str) -> None:
        """Deletes an export that has ended, with its files."""
        await self._trainer.change(self._stub().DeleteExport, DeleteExportRequest(name=full("exports", name)))


def is_taken(folder: Path) -> bool:
    """Says whether something is there that an export's files must not be mixed with."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _put(incoming: Path, target: Path) -> None:
    incoming.chmod(0o755)
    incoming.replace(target)
