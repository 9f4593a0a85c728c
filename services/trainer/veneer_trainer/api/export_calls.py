"""The calls of AdapterService about exports: convert, call in a thread, convert back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from veneer.trainer.v1 import adapter_service_pb2, adapter_service_pb2_grpc, export_pb2
from veneer_rpc.calls import serving_call
from veneer_rpc.names import ExportName
from veneer_rpc.paging import Paginator, Query
from veneer_rpc.threads import in_thread
from veneer_trainer.api.downloads import pieces
from veneer_trainer.api.export_convert import export_to_proto, spec_from_proto
from veneer_trainer.api.job_convert import age_of
from veneer_trainer.api.requests import request_of
from veneer_trainer.domain.exporting import Exports
from veneer_trainer.domain.exports import Export

_pb = adapter_service_pb2
_Context = grpc.aio.ServicerContext[Any, Any]


class ExportCalls(adapter_service_pb2_grpc.AdapterServiceServicer):
    """The methods say what they do in the contract; the rest of the service is AdapterServicer's.

    Args:
        exports: the use cases.
        paginator: makes pages.
    """

    def __init__(self, exports: Exports, paginator: Paginator) -> None:
        self._exports = exports
        self._paginator = paginator

    async def ExportAdapterVersion(  # noqa: D102  # the contract says it
        self, request: _pb.ExportAdapterVersionRequest, context: _Context
    ) -> export_pb2.Export:
        spec, asked = spec_from_proto(request.spec), request_of(request)
        return export_to_proto(await in_thread(self._exports.create, asked, spec))

    async def GetExport(  # noqa: D102  # the contract says it
        self, request: _pb.GetExportRequest, context: _Context
    ) -> export_pb2.Export:
        name = ExportName.parse(request.name)
        return export_to_proto(await in_thread(self._exports.get, serving_call().tenant, name))

    async def ListExports(  # noqa: D102  # the contract says it
        self, request: _pb.ListExportsRequest, context: _Context
    ) -> _pb.ListExportsResponse:
        tenant = serving_call().tenant
        query = Query("ListExports", tenant, filter=request.adapter_version)

        def fetch(after: tuple[str | int, ...] | None, limit: int) -> list[Export]:
            return self._exports.page(tenant, age_of(after), limit, request.adapter_version)

        def page() -> _pb.ListExportsResponse:
            found = self._paginator.page(
                query, request.page_size, request.page_token, fetch,
                lambda each: (repr(each.work.created_s), each.work.uid),
            )  # fmt: skip
            return _pb.ListExportsResponse(
                exports=map(export_to_proto, found.items), next_page_token=found.next_page_token
            )

        return await in_thread(page)

    async def CancelExport(  # noqa: D102  # the contract says it
        self, request: _pb.CancelExportRequest, context: _Context
    ) -> export_pb2.Export:
        name = ExportName.parse(request.name)
        return export_to_proto(await in_thread(self._exports.cancel, serving_call().tenant, name))

    async def DeleteExport(  # noqa: D102  # the contract says it
        self, request: _pb.DeleteExportRequest, context: _Context
    ) -> Empty:
        name = ExportName.parse(request.name)
        await in_thread(self._exports.delete, serving_call().tenant, name)
        return Empty()

    async def DownloadExport(  # noqa: D102  # the contract says it
        self, request: _pb.DownloadExportRequest, context: _Context
    ) -> AsyncIterator[_pb.DownloadExportResponse]:
        name, tenant = ExportName.parse(request.name), serving_call().tenant
        files, opened = await in_thread(self._exports.open, tenant, name, tuple(request.paths))
        try:
            async for file, offset, data in pieces(files, opened.read, request.offset_bytes):
                yield _pb.DownloadExportResponse(path=file.path, offset_bytes=offset, data=data)
        finally:
            opened.close()
