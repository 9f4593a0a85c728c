"""Datasets as they are read: versions, findings, rows with their pictures, and how two versions differ."""

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from veneer.dataset.v1.conversation_pb2 import Picture
from veneer.dataset.v1.dataset_pb2 import Dataset, DatasetVersion, Finding, Severity
from veneer.dataset.v1.dataset_service_pb2 import (
    PICTURE_FORM_DIGEST,
    DownloadBlobsRequest,
    Example,
    GetDatasetRequest,
    GetDatasetVersionRequest,
    ListDatasetsRequest,
    ListDatasetVersionsRequest,
    ListFindingsRequest,
    PictureChunk,
    PictureForm,
    ReadExamplesRequest,
    Shuffle,
)
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer_client import _diff
from veneer_client._calls import FOLLOW_ATTEMPTS, STREAM_TIMEOUT_S, Connection, Patience
from veneer_client._diff import DatasetDiff
from veneer_client._errors import NotFound, StatusError
from veneer_client._names import full, version

if TYPE_CHECKING:  # the generated code has it in its type stubs alone
    from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceAsyncStub


class DatasetReading:
    """The half of AsyncDatasets that changes nothing."""

    def __init__(self, dataset: Connection) -> None:
        self._dataset = dataset

    def _stub(self) -> "DatasetServiceAsyncStub":
        return self._dataset.stub(DatasetServiceStub)

    async def get(self, name: str) -> Dataset:
        """Returns a dataset."""
        return await self._dataset.read(self._stub().GetDataset, GetDatasetRequest(name=full("datasets", name)))

    async def list(self) -> AsyncIterator[Dataset]:
        """Yields all datasets, newest first."""
        request = ListDatasetsRequest()
        async for item in self._dataset.pages(self._stub().ListDatasets, request, lambda page: page.datasets):
            yield item

    async def get_version(self, name: str) -> DatasetVersion:
        """Returns a version: `digits` is the newest, `digits@<12 digits of its digest or more>` that one.

        Raises:
            NotFound: there is no such dataset or version, or the dataset has none yet.
        """
        whole = version("datasets", name)
        if whole.count("/") == 1:
            whole = (await self.get(name)).latest_version
            if not whole:
                raise NotFound("NO_VERSION", f"{name} has no version yet: push a folder to it", resource=name)
        return await self._dataset.read(self._stub().GetDatasetVersion, GetDatasetVersionRequest(name=whole))

    async def versions(self, name: str) -> AsyncIterator[DatasetVersion]:
        """Yields a dataset's versions, newest first."""
        request = ListDatasetVersionsRequest(parent=full("datasets", name))
        async for item in self._dataset.pages(
            self._stub().ListDatasetVersions, request, lambda page: page.dataset_versions
        ):
            yield item

    async def findings(
        self, name: str, *, severity: Severity.ValueType = Severity.SEVERITY_UNSPECIFIED, code: str = ""
    ) -> AsyncIterator[Finding]:
        """Yields all findings of a version, in the order of files and lines."""
        parent = (await self.get_version(name)).name
        request = ListFindingsRequest(parent=parent, severity=severity, code=code)
        async for item in self._dataset.pages(self._stub().ListFindings, request, lambda page: page.findings):
            yield item

    async def examples(
        self,
        name: str,
        split: str = "train",
        *,
        seed: int | None = None,
        epoch: int = 0,
        offset: int = 0,
        limit: int = 0,
        picture_form: PictureForm.ValueType = PICTURE_FORM_DIGEST,
        model: str = "",
        max_pixels: int = 0,
    ) -> AsyncIterator[Example]:
        """Yields the rows of a split, their pictures whole; a broken stream goes on at the next row.

        Args:
            name: a version, as for `get_version`.
            split: which of its splits.
            seed: shuffles, together with `epoch`. Default: stored order.
            epoch: from 0.
            offset: rows to skip in that order.
            limit: most rows to yield; 0 is to the end.
            picture_form: digests, files as uploaded, or pixels resized to a model's contract.
            model: the model whose contract resizes.
            max_pixels: bound on a resized picture's area. Default: the service's.

        Raises:
            NotFound: there is no such version, split or model.
            OutOfRange: `offset` lies past the split's end.
        """
        request = ReadExamplesRequest(
            dataset_version=(await self.get_version(name)).name,
            split=split,
            shuffle=None if seed is None else Shuffle(seed=seed, epoch=epoch),
            offset=offset,
            limit=limit,
            picture_form=picture_form,
            model=full("models", model) if model else "",
            max_pixels=max_pixels,
            batched=True,
        )
        patience = Patience(STREAM_TIMEOUT_S, FOLLOW_ATTEMPTS)
        while True:
            try:
                async for example in self._whole(request, patience.left_s()):
                    yield example
                    patience.progressed()
                    request.offset = example.index + 1
                    if limit:
                        request.limit = offset + limit - request.offset
                        if not request.limit:
                            return
                return
            except StatusError as error:
                await patience.wait(error)

    async def download(self, digests: Sequence[str]) -> AsyncIterator[tuple[str, bytes]]:
        """Yields digest and bytes of each blob, such as a picture's file as it was uploaded, in their order.

        Raises:
            NotFound: one is not there.
        """
        request = DownloadBlobsRequest(digests=digests)
        pieces: list[bytes] = []
        async for piece in self._dataset.stream(self._stub().DownloadBlobs, request):
            pieces.append(piece.data)
            if piece.offset_bytes + len(piece.data) == piece.size_bytes:
                yield piece.digest, b"".join(pieces)
                pieces = []

    async def diff(self, before: str, after: str) -> DatasetDiff:
        """Compares two versions, as for `get_version`, row by row."""
        old, new = await self.get_version(before), await self.get_version(after)
        return await _diff.compare(old, new, self.examples)

    async def _whole(self, request: ReadExamplesRequest, timeout_s: float) -> AsyncIterator[Example]:
        """Rows of one stream, each with the bytes that came after it."""
        example: Example | None = None
        chunks: list[PictureChunk] = []
        async for response in self._dataset.stream(self._stub().ReadExamples, request, timeout_s):
            if response.HasField("picture_chunk"):
                chunks.append(response.picture_chunk)
                continue
            for arrived in response.examples or (response.example,):
                if example is not None:
                    yield _completed(example, chunks)
                example, chunks = arrived, []
        if example is not None:
            yield _completed(example, chunks)


def pictures_of(example: Example) -> list[Picture]:
    """A row's pictures, in the order of messages and parts."""
    return [part.picture for message in example.messages for part in message.parts if part.HasField("picture")]


def _completed(example: Example, chunks: Sequence[PictureChunk]) -> Example:
    pictures = pictures_of(example)
    more: dict[int, list[bytes]] = {}
    for chunk in chunks:
        more.setdefault(chunk.picture_index, []).append(chunk.data)
    for index, pieces in more.items():
        picture = pictures[index]
        if picture.HasField("resized"):
            picture.resized.rgb = b"".join((picture.resized.rgb, *pieces))
        else:
            picture.data = b"".join((picture.data, *pieces))
    return example
