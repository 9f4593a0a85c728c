"""Sending blobs: ask which are missing, send only those, go on where a broken upload ended."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from veneer.dataset.v1.dataset_service_pb2 import (
    BlobHeader,
    FindMissingBlobsRequest,
    MissingBlob,
    UploadBlobsRequest,
)
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer_client._calls import FOLLOW_ATTEMPTS, STREAM_TIMEOUT_S, Connection, Patience
from veneer_client._errors import DataLoss, FolderError, StatusError
from veneer_client._folder import LocalBlob

ASKED_AT_ONCE = 10_000  # the contract's limit
PIECE_BYTES = 1024 * 1024  # the contract's limit
STREAM_BYTES = 32 * 1024 * 1024
STREAM_BLOBS = 500
STREAMS = 4


async def upload(
    dataset: Connection, blobs: Sequence[LocalBlob], on_sent: Callable[[int, int], None]
) -> tuple[int, int]:
    """Sends what the service lacks; returns how many blobs and bytes that were.

    Args:
        dataset: the dataset service.
        blobs: each content once.
        on_sent: is told how many of how many bytes the service has, of those that it lacked.

    Raises:
        FolderError: a file changed since it was hashed.
        StatusError: the service refused, or stayed away for too long.
    """
    by_digest = {blob.digest: blob for blob in blobs}
    missing = await _find_missing(dataset, list(by_digest))
    total_bytes = sum(by_digest[each.digest].size_bytes for each in missing)
    known_bytes = sum(each.received_bytes for each in missing)
    sent_bytes = known_bytes

    def count(size_bytes: int) -> None:
        nonlocal sent_bytes
        sent_bytes += size_bytes
        on_sent(sent_bytes, total_bytes)

    count(0)
    streams = asyncio.Semaphore(STREAMS)

    async def send(group: list[MissingBlob]) -> None:
        async with streams:
            await _send_group(dataset, by_digest, group, count)

    tasks = [asyncio.create_task(send(group)) for group in _groups(missing, by_digest)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return len(missing), total_bytes - known_bytes


async def _find_missing(dataset: Connection, digests: list[str]) -> list[MissingBlob]:
    stub = dataset.stub(DatasetServiceStub)
    found: list[MissingBlob] = []
    for start in range(0, len(digests), ASKED_AT_ONCE):
        request = FindMissingBlobsRequest(digests=digests[start : start + ASKED_AT_ONCE])
        found += (await dataset.read(stub.FindMissingBlobs, request)).missing
    return found


def _groups(missing: list[MissingBlob], blobs: dict[str, LocalBlob]) -> list[list[MissingBlob]]:
    """Shares the blobs out over streams of a bounded size."""
    groups: list[list[MissingBlob]] = [[]]
    size_bytes = 0
    for each in missing:
        if groups[-1] and (size_bytes >= STREAM_BYTES or len(groups[-1]) >= STREAM_BLOBS):
            groups.append([])
            size_bytes = 0
        groups[-1].append(each)
        size_bytes += blobs[each.digest].size_bytes
    return [group for group in groups if group]


async def _send_group(
    dataset: Connection, blobs: dict[str, LocalBlob], group: list[MissingBlob], count: Callable[[int], None]
) -> None:
    """Sends one stream; when it breaks, asks what arrived and sends the rest."""
    stub = dataset.stub(DatasetServiceStub)
    patience = Patience(STREAM_TIMEOUT_S, FOLLOW_ATTEMPTS)
    while group:
        counted = 0

        def count_here(size_bytes: int) -> None:
            nonlocal counted
            counted += size_bytes
            count(size_bytes)

        try:
            await dataset.send(stub.UploadBlobs, _pieces(blobs, group, count_here), patience.left_s())
            return
        except DataLoss as error:
            raise FolderError(f"a file changed while it was being sent: {error.message}. Push again") from error
        except StatusError as error:
            await patience.wait(error)
        before_bytes = _left_bytes(blobs, group)
        group = await _find_missing(dataset, [each.digest for each in group])
        arrived_bytes = before_bytes - _left_bytes(blobs, group)
        count(arrived_bytes - counted)  # what was sent and did not arrive is sent again
        if arrived_bytes:
            patience.progressed()


def _left_bytes(blobs: dict[str, LocalBlob], group: list[MissingBlob]) -> int:
    return sum(blobs[each.digest].size_bytes - each.received_bytes for each in group)


async def _pieces(
    blobs: dict[str, LocalBlob], group: list[MissingBlob], count: Callable[[int], None]
) -> AsyncIterator[UploadBlobsRequest]:
    for missing in group:
        blob, offset_bytes = blobs[missing.digest], missing.received_bytes
        yield UploadBlobsRequest(
            header=BlobHeader(digest=blob.digest, size_bytes=blob.size_bytes, offset_bytes=offset_bytes)
        )
        while offset_bytes < blob.size_bytes:
            limit_bytes = min(PIECE_BYTES, blob.size_bytes - offset_bytes)
            data = await asyncio.to_thread(blob.read, offset_bytes, limit_bytes)
            if not data:
                raise FolderError(f"{blob.path} became shorter while it was being sent. Push again")
            yield UploadBlobsRequest(data=data)
            offset_bytes += len(data)
            count(len(data))
