"""Datasets: pushing a folder, and reading what became of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.dataset.v1.dataset_pb2 import (
    Dataset,
    DatasetVersion,
    Finding,
    Phase,
    Severity,
    SplitPolicy,
    VersionProgress,
)
from veneer.dataset.v1.dataset_service_pb2 import (
    CreateDatasetRequest,
    CreateDatasetVersionRequest,
    DeleteDatasetRequest,
    DeleteDatasetVersionRequest,
    GetDatasetRequest,
    GetDatasetVersionRequest,
    ListDatasetsRequest,
    ListDatasetVersionsRequest,
    ListFindingsRequest,
    RowFile,
    UpdateDatasetRequest,
)
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer_client._calls import FOLLOW_ATTEMPTS, STREAM_TIMEOUT_S, Connection, Patience, fill_request_id
from veneer_client._errors import FailedPrecondition, Internal, NotFound, RowsRefused, StatusError
from veneer_client._folder import LocalBlob, bytes_blob, read_folder, split_of
from veneer_client._names import full, version
from veneer_client._upload import upload

if TYPE_CHECKING:  # the generated code has it in its type stubs alone
    from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceAsyncStub

HASHING = "hashing"
UPLOADING = "uploading"


@dataclass(frozen=True, slots=True)
class PushProgress:
    """How far a push is.

    Attributes:
        phase: `hashing`, `uploading`, or what the service does: `reading rows`, `checking pictures`,
            `counting tokens`, `writing`.
        done: files, bytes (while uploading), rows or pictures that are done in this phase.
        total: how many there are; 0 while unknown.
        remaining_s: until the version is made, as the service estimates; None while unknown.
    """

    phase: str
    done: int
    total: int
    remaining_s: float | None = None


@dataclass(frozen=True, slots=True)
class Push:
    """What a push made.

    Attributes:
        version: the dataset version, with its digest and report.
        findings: the first 100 of them.
        sent_blobs: how many files the service lacked.
        sent_bytes: what was sent of them, now.
        reused_blobs: how many it had.
    """

    version: DatasetVersion
    findings: tuple[Finding, ...]
    sent_blobs: int
    sent_bytes: int
    reused_blobs: int


class AsyncDatasets:
    """Datasets and their versions."""

    def __init__(self, dataset: Connection) -> None:
        self._dataset = dataset

    def _stub(self) -> "DatasetServiceAsyncStub":
        return self._dataset.stub(DatasetServiceStub)

    async def push(
        self,
        folder: str | Path,
        name: str,
        *,
        prompt: str | None = None,
        model: str = "",
        max_pixels: int = 0,
        split_policy: SplitPolicy | None = None,
        strict: bool = False,
        validate_only: bool = False,
        on_progress: Callable[[PushProgress], None] = lambda progress: None,
    ) -> Push:
        """Uploads what the service lacks of a folder's rows and pictures, and freezes them as a version.

        A push that broke off goes on where it was when it is called again.

        Args:
            folder: holds `*.jsonl` and the pictures that its lines name by relative path.
            name: the dataset, created when it does not exist.
            prompt: the dataset's default prompt, for plain pairs that have none of their own.
            model: counts tokens by this model's contract. Default: no counts.
            max_pixels: bound on a picture's area for the counts. Default: the service's.
            split_policy: how rows get their split. Default: by the names of the files.
            strict: a single refused row refuses the version.
            validate_only: checks and reports, keeps nothing but the uploaded bytes.
            on_progress: is told how far the push is, from another thread.

        Raises:
            FolderError: the folder holds no rows, or changed meanwhile.
            RowsRefused: rows were refused and `strict` is set, or none was accepted; `.findings` says why.
        """
        files = await asyncio.to_thread(
            read_folder, Path(folder), lambda done, total: on_progress(PushProgress(HASHING, done, total))
        )
        parent = await self._ensure(full("datasets", name), prompt)
        blobs = files.blobs()
        sent_blobs, sent_bytes = await self.upload(blobs, on_progress)
        request = CreateDatasetVersionRequest(
            parent=parent,
            row_files=[
                RowFile(path=rows.path, digest=rows.digest, split=split_of(rows.path)) for rows in files.row_files
            ],
            picture_manifest=files.manifest.digest,
            split_policy=split_policy,
            model=full("models", model) if model else "",
            max_pixels=max_pixels,
            strict=strict,
            validate_only=validate_only,
        )
        made, findings = await self._freeze(request, on_progress)
        return Push(made, findings, sent_blobs, sent_bytes, len(blobs) - sent_blobs)

    async def upload(
        self,
        blobs: Sequence[LocalBlob],
        on_progress: Callable[[PushProgress], None] = lambda progress: None,
    ) -> tuple[int, int]:
        """Sends those blobs that the service lacks; returns how many blobs and bytes that were."""
        return await upload(self._dataset, blobs, lambda done, total: on_progress(PushProgress(UPLOADING, done, total)))

    async def upload_bytes(self, data: bytes) -> str:
        """Stores bytes, such as a picture too large for a request, and returns their digest."""
        blob = bytes_blob("bytes", data)
        await self.upload([blob])
        return blob.digest

    async def get(self, name: str) -> Dataset:
        """Returns a dataset."""
        return await self._dataset.read(self._stub().GetDataset, GetDatasetRequest(name=full("datasets", name)))

    async def list(self) -> AsyncIterator[Dataset]:
        """Yields all datasets, newest first."""
        request = ListDatasetsRequest()
        async for item in self._dataset.pages(self._stub().ListDatasets, request, lambda page: page.datasets):
            yield item

    async def delete(self, name: str) -> None:
        """Deletes a dataset with its versions."""
        await self._dataset.change(self._stub().DeleteDataset, DeleteDatasetRequest(name=full("datasets", name)))

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

    async def delete_version(self, name: str) -> None:
        """Deletes a version by its full name or as `digits@<digest>`."""
        request = DeleteDatasetVersionRequest(name=version("datasets", name))
        await self._dataset.change(self._stub().DeleteDatasetVersion, request)

    async def findings(
        self, name: str, *, severity: Severity.ValueType = Severity.SEVERITY_UNSPECIFIED, code: str = ""
    ) -> AsyncIterator[Finding]:
        """Yields all findings of a version, in the order of files and lines."""
        parent = (await self.get_version(name)).name
        request = ListFindingsRequest(parent=parent, severity=severity, code=code)
        async for item in self._dataset.pages(self._stub().ListFindings, request, lambda page: page.findings):
            yield item

    async def _ensure(self, name: str, prompt: str | None) -> str:
        try:
            dataset = await self.get(name)
        except NotFound:
            fields = Dataset(default_prompt=prompt or "")
            request = CreateDatasetRequest(dataset_id=name.removeprefix("datasets/"), dataset=fields)
            dataset = await self._dataset.change(self._stub().CreateDataset, request)
        if prompt is not None and dataset.default_prompt != prompt:
            update = UpdateDatasetRequest(dataset=Dataset(name=name, default_prompt=prompt, etag=dataset.etag))
            update.update_mask.paths.append("default_prompt")
            await self._dataset.change(self._stub().UpdateDataset, update)
        return name

    async def _freeze(
        self, request: CreateDatasetVersionRequest, on_progress: Callable[[PushProgress], None]
    ) -> tuple[DatasetVersion, tuple[Finding, ...]]:
        fill_request_id(request)  # so that a second attempt joins the work of the first
        patience = Patience(STREAM_TIMEOUT_S, FOLLOW_ATTEMPTS)
        while True:
            findings: list[Finding] = []
            try:
                async for message in self._dataset.stream(
                    self._stub().CreateDatasetVersion, request, patience.left_s()
                ):
                    patience.progressed()
                    if message.HasField("dataset_version"):
                        return message.dataset_version, tuple(findings)
                    findings += message.findings.findings
                    if message.HasField("progress"):
                        on_progress(_progress(message.progress))
                raise Internal("NO_VERSION", "the service ended the stream without a version")
            except FailedPrecondition as error:
                raise RowsRefused.of(error, findings) from None
            except StatusError as error:
                await patience.wait(error)


def _progress(progress: VersionProgress) -> PushProgress:
    phase = Phase.Name(progress.phase).removeprefix("PHASE_").replace("_", " ").lower()
    remaining_s = progress.remaining.ToMilliseconds() / 1000 if progress.HasField("remaining") else None
    return PushProgress(phase, progress.done, progress.total, remaining_s)
