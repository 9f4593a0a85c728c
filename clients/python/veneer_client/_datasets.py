"""Datasets: pushing a folder, and reading what became of it."""

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.dataset.v1.dataset_pb2 import (
    Dataset,
    DatasetVersion,
    Finding,
    Phase,
    SplitPolicy,
    VersionProgress,
)
from veneer.dataset.v1.dataset_service_pb2 import (
    CreateDatasetRequest,
    CreateDatasetVersionRequest,
    DeleteDatasetRequest,
    DeleteDatasetVersionRequest,
    RowFile,
    UpdateDatasetRequest,
)
from veneer_client._calls import FOLLOW_ATTEMPTS, STREAM_TIMEOUT_S, Patience, fill_request_id
from veneer_client._errors import FailedPrecondition, Internal, NotFound, RowsRefused, StatusError
from veneer_client._folder import LocalBlob, bytes_blob, read_folder
from veneer_client._names import full, version
from veneer_client._reading import DatasetReading
from veneer_client._upload import upload

CONVERTING = "converting"
HASHING = "hashing"
UPLOADING = "uploading"


@dataclass(frozen=True, slots=True)
class PushProgress:
    """How far a push is.

    Attributes:
        phase: `converting` (rows of tables), `hashing`, `uploading`, or what the service does: `reading rows`,
            `checking pictures`, `counting tokens`, `writing`.
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


class AsyncDatasets(DatasetReading):
    """Datasets and their versions."""

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
            folder: holds `*.jsonl` and the pictures that its lines name by relative path. Parquet files, and what
                `save_to_disk` of `datasets` wrote, are taken too, pictures in them included; they are written out below
                the machine's folder for temporary files first, which takes the room that the pictures take.
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
        with tempfile.TemporaryDirectory(prefix="veneer-push-") as scratch:
            files = await asyncio.to_thread(
                read_folder,
                Path(folder),
                Path(scratch),
                lambda done, total: on_progress(PushProgress(HASHING, done, total)),
                lambda done: on_progress(PushProgress(CONVERTING, done, 0)),
            )
            blobs = files.blobs()
            sent_blobs, sent_bytes = await self.upload(blobs, on_progress)
        wanted = full("datasets", name)
        request = CreateDatasetVersionRequest(
            parent=wanted,
            row_files=[
                RowFile(path=rows.path, digest=rows.digest, split=split)
                for rows, split in zip(files.row_files, files.splits, strict=True)
            ],
            picture_manifest=files.manifest.digest,
            split_policy=split_policy,
            model=full("models", model) if model else "",
            max_pixels=max_pixels,
            strict=strict,
            validate_only=validate_only,
        )
        if validate_only:
            made, findings = await self._rehearsed(request, prompt, on_progress)
        else:
            await self._ensure(wanted, prompt)
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

    async def delete(self, name: str) -> None:
        """Deletes a dataset with its versions."""
        await self._dataset.change(self._stub().DeleteDataset, DeleteDatasetRequest(name=full("datasets", name)))

    async def delete_version(self, name: str) -> None:
        """Deletes a version by its full name or as `digits@<digest>`."""
        request = DeleteDatasetVersionRequest(name=version("datasets", name))
        await self._dataset.change(self._stub().DeleteDatasetVersion, request)

    async def _ensure(self, name: str, prompt: str | None) -> None:
        """Creates the dataset where it is not there; gives it the prompt."""
        try:
            dataset = await self.get(name)
        except NotFound:
            dataset = await self._create(name, prompt or "")
        if prompt is not None and dataset.default_prompt != prompt:
            update = UpdateDatasetRequest(dataset=Dataset(name=name, default_prompt=prompt, etag=dataset.etag))
            update.update_mask.paths.append("default_prompt")
            await self._dataset.change(self._stub().UpdateDataset, update)

    async def _create(self, name: str, prompt: str) -> Dataset:
        fields = Dataset(default_prompt=prompt)
        request = CreateDatasetRequest(dataset_id=name.removeprefix("datasets/"), dataset=fields)
        return await self._dataset.change(self._stub().CreateDataset, request)

    async def _rehearsed(
        self,
        request: CreateDatasetVersionRequest,
        prompt: str | None,
        on_progress: Callable[[PushProgress], None],
    ) -> tuple[DatasetVersion, tuple[Finding, ...]]:
        """Validates without a trace: where no dataset has the name and prompt, against one that goes again."""
        name, dataset = request.parent, None
        with contextlib.suppress(NotFound):
            dataset = await self.get(name)
        if dataset is not None and prompt in (None, dataset.default_prompt):
            return await self._freeze(request, on_progress)
        if prompt is None:
            prompt = ""
        stand_in = await self._create(f"datasets/dry-run-{uuid.uuid4().hex[:16]}", prompt)
        try:
            request.parent = stand_in.name
            made, findings = await self._freeze(request, on_progress)
        finally:
            await self.delete(stand_in.name)
        made.name = made.name.replace(stand_in.name, name, 1)
        return made, findings

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
