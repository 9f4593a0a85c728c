"""Calls about blobs."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from veneer.dataset.v1 import dataset_service_pb2
from veneer_dataset.api.app import App, tenant
from veneer_dataset.api.handover import drawn
from veneer_dataset.api.requests import check_digests
from veneer_dataset.domain.blobs import Blob
from veneer_dataset.domain.uploads import BlobHeader, Upload
from veneer_rpc.errors import DeadlineExceeded, InvalidArgument, OutOfRange
from veneer_rpc.threads import in_thread

MAX_FIND = 10_000
MAX_DOWNLOAD = 1_000

_TAKEN_AT_ONCE_BYTES = 1024 * 1024
_TAKEN_AT_ONCE = 512

_Request = dataset_service_pb2.UploadBlobsRequest


class BlobCalls:
    """See the contract."""

    _app: App

    async def FindMissingBlobs(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.FindMissingBlobsRequest, context: object
    ) -> dataset_service_pb2.FindMissingBlobsResponse:
        digests = list(request.digests)
        check_digests(digests, MAX_FIND)
        missing = await in_thread(self._app.blobs.missing, tenant(), digests)
        return dataset_service_pb2.FindMissingBlobsResponse(
            missing=[
                dataset_service_pb2.MissingBlob(digest=digest, received_bytes=received) for digest, received in missing
            ]
        )

    async def UploadBlobs(  # noqa: D102  # the contract says it
        self, requests: AsyncIterator[_Request], context: object
    ) -> dataset_service_pb2.UploadBlobsResponse:
        app = self._app
        upload = await in_thread(Upload, tenant(), app.blobs, app.partial, app.quota_bytes)
        pieces: list[BlobHeader | bytes] = []
        size_bytes = 0
        try:
            while (request := await self._next(requests)) is not None:
                pieces.append(_piece(request))
                size_bytes += len(request.data)
                if size_bytes >= _TAKEN_AT_ONCE_BYTES or len(pieces) >= _TAKEN_AT_ONCE:
                    taken, pieces, size_bytes = pieces, [], 0
                    await in_thread(upload.take, taken)
        finally:
            try:
                await in_thread(upload.take, pieces)
            finally:
                await in_thread(upload.close)
        return dataset_service_pb2.UploadBlobsResponse(digests=upload.completed)

    async def DownloadBlobs(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.DownloadBlobsRequest, context: object
    ) -> AsyncIterator[dataset_service_pb2.DownloadBlobsResponse]:
        check_digests(list(request.digests), MAX_DOWNLOAD)
        blobs = await in_thread(self._app.blobs.find, tenant(), list(request.digests))
        if not 0 <= request.offset_bytes <= blobs[0].size_bytes:
            raise OutOfRange(
                "OFFSET_PAST_END",
                f"offset_bytes must be 0 to {blobs[0].size_bytes}, was {request.offset_bytes}",
            )
        async for response in drawn(lambda: self._pieces(blobs, request.offset_bytes)):
            yield response

    def _pieces(self, blobs: list[Blob], offset_bytes: int) -> Iterator[dataset_service_pb2.DownloadBlobsResponse]:
        for blob in blobs:
            at = offset_bytes
            for data in self._app.blobs.read(blob, at) if blob.size_bytes else (b"",):
                yield dataset_service_pb2.DownloadBlobsResponse(
                    digest=blob.digest, offset_bytes=at, size_bytes=blob.size_bytes, data=data
                )
                at += len(data)
            offset_bytes = 0

    async def _next(self, requests: AsyncIterator[_Request]) -> _Request | None:
        try:
            async with asyncio.timeout(self._app.stall_s) as timer:
                return await anext(requests, None)
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise DeadlineExceeded("UPLOAD_STALLED", f"nothing came for {self._app.stall_s:g} s, the limit") from error


def _piece(request: _Request) -> BlobHeader | bytes:
    match request.WhichOneof("piece"):
        case "header":
            header = request.header
            return BlobHeader(header.digest, header.size_bytes, header.offset_bytes)
        case "data":
            return request.data
        case _:
            raise InvalidArgument("PIECE_MISSING", "a message of an upload holds a header or data")
