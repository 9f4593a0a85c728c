"""A cluster in this process that speaks the real contract: real gRPC on loopback, rows and jobs made up.

It keeps what it was told (`cluster.requests`), and fails when it is told to (`cluster.fail`).
"""

# ruff: noqa: ANN401  # a servicer's context has no useful type; the contract names the methods

import asyncio
import hashlib
import json
import tomllib
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2
from google.rpc import error_details_pb2, status_pb2

from veneer.dataset.v1 import dataset_pb2, dataset_service_pb2, dataset_service_pb2_grpc
from veneer.inference.v1 import inference_pb2, inference_service_pb2, inference_service_pb2_grpc
from veneer.trainer.v1 import (
    adapter_pb2,
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    evaluation_pb2,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    export_pb2,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    training_job_pb2,
    training_service_pb2,
    training_service_pb2_grpc,
)
from veneer_client import Client, cli
from veneer_client._loop import LoopThread

TOKEN = "vnr_test"
PROJECT = Path(__file__).parents[3] / "pyproject.toml"
Job = training_job_pb2.TrainingJob
State = training_job_pb2.JobState


@dataclass
class Fault:
    """A failure to come: of which method, with what status, after how many messages or bytes."""

    code: grpc.StatusCode
    reason: str = "FAULT"
    message: str = "told to fail"
    retry_after_s: float | None = None
    after: int = 0
    violations: tuple[tuple[str, str], ...] = ()


@dataclass
class FakeCluster:
    """What all services of the cluster know."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    arriving: dict[str, bytes] = field(default_factory=dict)
    datasets: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, list[Any]] = field(default_factory=dict)
    jobs: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, Any] = field(default_factory=dict)
    adapter_versions: dict[str, Any] = field(default_factory=dict)
    moves: list[Any] = field(default_factory=list)
    examples: list[Any] = field(default_factory=list)
    imported: dict[str, bytes] = field(default_factory=dict)
    evaluations: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[Any]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    requests: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    faults: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    answered_by: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    bases: int = 1
    code_version: str = "1"
    export: Any = None
    export_failure: Any = None
    certificate: bytes = b""
    damaged: str = ""
    steps: int = 5
    end: Any = State.JOB_STATE_SUCCEEDED
    step_s: float = 0.0
    piece_s: float = 0.0

    def fail(self, method: str, code: str, times: int = 1, **how: Any) -> None:
        """Lets the next calls of a method fail."""
        self.faults[method] += [Fault(grpc.StatusCode[code], **how)] * times

    async def begin(self, method: str, request: Any, context: Any) -> Fault | None:
        """Checks the token, notes the request, and fails where that is due; returns a failure for later."""
        if dict(context.invocation_metadata()).get("authorization") != f"Bearer {TOKEN}":
            await refuse(context, Fault(grpc.StatusCode.UNAUTHENTICATED, "TOKEN_UNKNOWN", "unknown token"))
        if request is not None:
            copy = type(request)()
            copy.CopyFrom(request)
            self.requests[method].append(copy)
        fault = self.faults[method].pop(0) if self.faults[method] else None
        if fault and fault.after == 0:
            await refuse(context, fault)
        return fault

    def once(self, request: Any, make: Callable[[], Any]) -> Any:
        """The same request id gets the first result."""
        if not request.request_id:
            return make()
        if request.request_id not in self.results:
            self.results[request.request_id] = make()
        return self.results[request.request_id]


async def refuse(context: Any, fault: Fault) -> None:
    status = status_pb2.Status(code=fault.code.value[0], message=fault.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=fault.reason, domain="veneer"))
    if fault.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(fault.retry_after_s * 1000))
        status.details.add().Pack(retry)
    if fault.violations:
        wrong = error_details_pb2.BadRequest()
        for path, description in fault.violations:
            wrong.field_violations.add(field=path, description=description, reason="OUT_OF_RANGE")
        status.details.add().Pack(wrong)
    details = ("grpc-status-details-bin", status.SerializeToString())
    await context.abort(fault.code, fault.message, trailing_metadata=(details,))


async def not_found(context: Any, name: str) -> None:
    await refuse(context, Fault(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", f"there is no {name}"))


class DatasetService(dataset_service_pb2_grpc.DatasetServiceServicer):
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    async def GetDataset(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("GetDataset", request, context)
        if request.name not in self.cluster.datasets:
            await not_found(context, request.name)
        return self.cluster.datasets[request.name]

    async def ListDatasets(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListDatasets", request, context)
        return dataset_service_pb2.ListDatasetsResponse(datasets=self.cluster.datasets.values())

    async def CreateDataset(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("CreateDataset", request, context)
        name = f"datasets/{request.dataset_id}"
        made = dataset_pb2.Dataset(name=name, default_prompt=request.dataset.default_prompt, etag="1")
        return self.cluster.datasets.setdefault(name, made)

    async def UpdateDataset(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("UpdateDataset", request, context)
        self.cluster.datasets[request.dataset.name].default_prompt = request.dataset.default_prompt
        return self.cluster.datasets[request.dataset.name]

    async def FindMissingBlobs(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("FindMissingBlobs", request, context)
        missing = [
            dataset_service_pb2.MissingBlob(digest=digest, received_bytes=len(self.cluster.arriving.get(digest, b"")))
            for digest in request.digests
            if digest not in self.cluster.blobs
        ]
        return dataset_service_pb2.FindMissingBlobsResponse(missing=missing)

    async def UploadBlobs(self, requests: AsyncIterator[Any], context: Any) -> Any:
        fault = await self.cluster.begin("UploadBlobs", None, context)
        done, header, taken_bytes = [], None, 0
        async for request in requests:
            if request.HasField("header"):
                header = request.header
                self.cluster.requests["UploadBlobs"].append(header)
                held = self.cluster.arriving.setdefault(header.digest, b"")
                if header.offset_bytes != len(held):
                    message = f"offset {header.offset_bytes}, {len(held)} bytes are here"
                    await refuse(context, Fault(grpc.StatusCode.OUT_OF_RANGE, "GAP", message))
            else:
                assert len(request.data) <= 1024 * 1024
                self.cluster.arriving[header.digest] += request.data
                taken_bytes += len(request.data)
            if fault and taken_bytes >= fault.after:
                await refuse(context, fault)
            data = self.cluster.arriving[header.digest]
            if len(data) == header.size_bytes:
                if hashlib.sha256(data).hexdigest() != header.digest:
                    del self.cluster.arriving[header.digest]
                    await refuse(context, Fault(grpc.StatusCode.DATA_LOSS, "DIGEST_MISMATCH", "other bytes"))
                self.cluster.blobs[header.digest] = self.cluster.arriving.pop(header.digest)
                done.append(header.digest)
        return dataset_service_pb2.UploadBlobsResponse(digests=done)

    async def CreateDatasetVersion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        fault = await self.cluster.begin("CreateDatasetVersion", request, context)
        event = dataset_service_pb2.CreateDatasetVersionResponse
        manifest = [json.loads(line) for line in self.cluster.blobs[request.picture_manifest].splitlines()]
        pictures = {each["path"]: each["digest"] for each in manifest}
        version = dataset_pb2.DatasetVersion()
        report, findings, hasher = version.report, [], hashlib.sha256()
        for rows in request.row_files:
            lines = self.cluster.blobs[rows.digest].decode().splitlines()
            progress = dataset_pb2.VersionProgress(phase="PHASE_READING_ROWS", total=len(lines))
            yield event(progress=progress)
            accepted = 0
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                found = next((path for path in (row["image"], f"images/{row['image']}") if path in pictures), "")
                finding = dataset_pb2.Finding(path=rows.path, line=number, json_path="$.image")
                finding.found = row["image"]
                if not found:
                    finding.code, finding.severity = "PICTURE_MISSING", dataset_pb2.Severity.SEVERITY_ERROR
                    finding.expected, finding.remedy = "a picture of that path", "Add it, or mend the path."
                    findings.append(finding)
                    continue
                if found != row["image"]:
                    finding.code, finding.severity = "PATH_RESOLVED", dataset_pb2.Severity.SEVERITY_WARNING
                    finding.remedy = f"Write {found}."
                    findings.append(finding)
                accepted += 1
                hasher.update(f"{rows.split}{line}{pictures[found]}".encode())
            report.row_files.add(path=rows.path, submitted_rows=len(lines), accepted_rows=accepted)
            report.submitted_rows += len(lines)
            report.accepted_rows += accepted
            split = version.splits.add(split=rows.split or "train", row_count=accepted)
            if request.model:
                report.model = request.model
                split.tokens.visual, split.tokens.prompt, split.tokens.supervised = 9000, 50, 3
            if fault:
                await refuse(context, fault)
        report.refused_rows = report.submitted_rows - report.accepted_rows
        if findings:
            yield event(findings=dataset_service_pb2.FindingBatch(findings=findings[:100]))
        if report.accepted_rows == 0 or (request.strict and report.refused_rows):
            message = f"{report.refused_rows} of {report.submitted_rows} rows were refused"
            await refuse(context, Fault(grpc.StatusCode.FAILED_PRECONDITION, "ROWS_REFUSED", message))
        version.digest = hasher.hexdigest()
        version.name = f"{request.parent}/versions/{version.digest}"
        version.picture_count = len(pictures)
        version.picture_size_bytes = sum(len(self.cluster.blobs[digest]) for digest in pictures.values())
        self.cluster.versions[version.name] = version
        self.cluster.findings[version.name] = findings
        self.cluster.datasets[request.parent].latest_version = version.name
        self.cluster.datasets[request.parent].version_count += 1
        yield event(dataset_version=version)

    async def GetDatasetVersion(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("GetDatasetVersion", request, context)
        found = [each for name, each in self.cluster.versions.items() if name.startswith(request.name)]
        if len(found) != 1:
            await not_found(context, request.name)
        return found[0]

    async def ListDatasetVersions(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListDatasetVersions", request, context)
        found = [each for name, each in self.cluster.versions.items() if name.startswith(request.parent)]
        return dataset_service_pb2.ListDatasetVersionsResponse(dataset_versions=found)

    async def ListFindings(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListFindings", request, context)
        found = self.cluster.findings[request.parent]
        start = int(request.page_token or 0)
        rest = str(start + 2) if start + 2 < len(found) else ""
        return dataset_service_pb2.ListFindingsResponse(findings=found[start : start + 2], next_page_token=rest)

    async def ReadExamples(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.cluster.begin("ReadExamples", request, context)
        rows = self.cluster.examples[request.offset :]
        rows = rows[: request.limit] if request.limit else rows
        assert request.batched
        for start in range(0, len(rows), 2):
            yield dataset_service_pb2.ReadExamplesResponse(examples=rows[start : start + 2])


class TrainerService(training_service_pb2_grpc.TrainerServiceServicer):
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    async def CreateTrainingJob(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("CreateTrainingJob", request, context)
        spec = request.training_job.spec
        if spec.lora.HasField("rank") and spec.lora.rank < 1:
            fault = Fault(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS", "spec.lora.rank: must be 1 to 512")
            fault.violations = (("spec.lora.rank", "must be 1 to 512, was 0"),)
            await refuse(context, fault)

        def make() -> Any:
            name = f"trainingJobs/{request.training_job_id or f'j{len(self.cluster.jobs) + 1}'}"
            job = Job(name=name, uid=str(uuid.uuid4()), spec=spec, state=State.JOB_STATE_QUEUED, revision=1)
            job.create_time.GetCurrentTime()
            if not request.validate_only:
                self.cluster.jobs[name] = job
            return job

        made = self.cluster.once(request, make)
        lost = self.cluster.faults["CreateTrainingJob.reply"]
        if lost:
            await refuse(context, lost.pop(0))
        return made

    async def GetTrainingJob(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("GetTrainingJob", request, context)
        if request.name not in self.cluster.jobs:
            await not_found(context, request.name)
        return self.cluster.jobs[request.name]

    async def ListTrainingJobs(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListTrainingJobs", request, context)
        found = list(self.cluster.jobs.values())[::-1]
        start = int(request.page_token or 0)
        rest = str(start + 2) if start + 2 < len(found) else ""
        return training_service_pb2.ListTrainingJobsResponse(
            training_jobs=found[start : start + 2], next_page_token=rest
        )

    async def WatchTrainingJob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        fault = await self.cluster.begin("WatchTrainingJob", request, context)
        if request.name not in self.cluster.jobs:
            await not_found(context, request.name)
        job = self.cluster.jobs[request.name]
        sent = 0
        if request.after_revision < 1:
            yield training_service_pb2.WatchTrainingJobResponse(training_job=job)
            sent = 1
        if job.state in (State.JOB_STATE_SUCCEEDED, State.JOB_STATE_FAILED):
            return
        for step in range(1, self.cluster.steps + 1):
            if fault and sent >= fault.after:
                await refuse(context, fault)
            revision = step + 1
            if revision <= request.after_revision or job.state == State.JOB_STATE_CANCELLED:
                continue
            await asyncio.sleep(self.cluster.step_s)
            job.state, job.revision = State.JOB_STATE_RUNNING, revision
            progress = job.progress
            progress.step, progress.total_steps, progress.loss = step, self.cluster.steps, 2.0 / step
            progress.epoch, progress.rows_per_second, progress.learning_rate = step / 2, 7.5, 2e-4
            progress.remaining.FromSeconds(self.cluster.steps - step)
            yield training_service_pb2.WatchTrainingJobResponse(training_job=job)
            sent += 1
        if job.state != State.JOB_STATE_CANCELLED:
            job.state = self.cluster.end
            if job.state == State.JOB_STATE_SUCCEEDED:
                job.adapter_version = self.publish(job)
            else:
                job.failure.reason, job.failure.message = "NON_FINITE_LOSS", "the loss of step 3 is NaN"
        job.revision += 1
        yield training_service_pb2.WatchTrainingJobResponse(training_job=job)

    async def GetTrainingCurve(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("GetTrainingCurve", request, context)
        if request.name not in self.cluster.jobs:
            await not_found(context, request.name)
        curve = training_service_pb2.TrainingCurve()
        for step in range(1, self.cluster.jobs[request.name].progress.step + 1):
            point = curve.points.add(step=step, loss=2.0 / step, learning_rate=2e-4, gradient_norm=1.0)
            if step % 2 == 0:
                point.validation_loss = 2.5 / step
        return curve

    def publish(self, job: Any) -> str:
        adapters = self.cluster.adapters
        adapter = adapters.setdefault(
            job.spec.adapter, adapter_pb2.Adapter(name=job.spec.adapter, model=job.spec.model)
        )
        adapter.latest_version += 1
        if adapter.latest_version == 1:
            adapter.aliases["production"] = 1
        name = f"{adapter.name}/versions/{adapter.latest_version}"
        seal = f"{job.spec.dataset_version} {job.spec.seed} {job.spec.lora.rank}".encode()
        version = adapter_pb2.AdapterVersion(name=name, digest=hashlib.sha256(seal).hexdigest())
        for path, data in self.cluster.files.items():
            version.files.add(path=path, digest=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        version.size_bytes = sum(map(len, self.cluster.files.values()))
        version.lora.rank = job.spec.lora.rank or 8
        version.lineage.training_job = job.name
        version.lineage.spec.CopyFrom(job.spec)
        version.lineage.code_version = self.cluster.code_version
        version.final_progress.CopyFrom(job.progress)
        self.cluster.adapter_versions[name] = version
        return name

    async def CancelTrainingJob(self, request: Any, context: Any) -> Any:
        return await self._move("CancelTrainingJob", request, context, State.JOB_STATE_CANCELLED)

    async def PauseTrainingJob(self, request: Any, context: Any) -> Any:
        return await self._move("PauseTrainingJob", request, context, State.JOB_STATE_PAUSED)

    async def ResumeTrainingJob(self, request: Any, context: Any) -> Any:
        return await self._move("ResumeTrainingJob", request, context, State.JOB_STATE_QUEUED)

    async def RetryTrainingJob(self, request: Any, context: Any) -> Any:
        return await self._move("RetryTrainingJob", request, context, State.JOB_STATE_QUEUED)

    async def DeleteTrainingJob(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("DeleteTrainingJob", request, context)
        del self.cluster.jobs[request.name]
        return empty_pb2.Empty()

    async def _move(self, method: str, request: Any, context: Any, state: Any) -> Any:
        await self.cluster.begin(method, request, context)
        if request.name not in self.cluster.jobs:
            await not_found(context, request.name)
        job = self.cluster.jobs[request.name]
        job.state = state
        return job


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.model = model_pb2.Model(name="models/tiny", digest="ab" * 32, parameter_count=2_130_000_000)
        self.model.workers.append("worker-1")

    async def GetModel(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("GetModel", request, context)
        return self.model

    async def ListModels(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListModels", request, context)
        return model_service_pb2.ListModelsResponse(models=[self.model] * self.cluster.bases)


class AdapterService(adapter_service_pb2_grpc.AdapterServiceServicer):
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    async def GetAdapter(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("GetAdapter", request, context)
        if request.name not in self.cluster.adapters:
            await not_found(context, request.name)
        return self.cluster.adapters[request.name]

    async def ListAdapters(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListAdapters", request, context)
        return adapter_service_pb2.ListAdaptersResponse(adapters=self.cluster.adapters.values())

    async def GetAdapterVersion(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("GetAdapterVersion", request, context)
        parent, _, which = request.name.partition("/versions/")
        if not which.isdigit() and parent in self.cluster.adapters:
            which = self.cluster.adapters[parent].aliases.get(which, 0)
        name = f"{parent}/versions/{which}"
        if name not in self.cluster.adapter_versions:
            await not_found(context, request.name)
        return self.cluster.adapter_versions[name]

    async def ListAdapterVersions(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListAdapterVersions", request, context)
        found = [each for name, each in self.cluster.adapter_versions.items() if name.startswith(f"{request.parent}/")]
        return adapter_service_pb2.ListAdapterVersionsResponse(adapter_versions=found[::-1])

    async def PromoteAdapterVersion(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("PromoteAdapterVersion", request, context)
        if request.name not in self.cluster.adapter_versions:
            await not_found(context, request.name)
        parent, _, number = request.name.partition("/versions/")
        return self._move(parent, request.alias or "production", int(number), request.reason)

    async def RollbackAdapter(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("RollbackAdapter", request, context)
        alias = request.alias or "production"
        back = next((move.from_version for move in self.cluster.moves if move.alias == alias), 0)
        if not back:
            message = f"{alias} of {request.name} has no version before"
            await refuse(context, Fault(grpc.StatusCode.FAILED_PRECONDITION, "NO_VERSION_BEFORE", message))
        return self._move(request.name, alias, back, request.reason)

    def _move(self, name: str, alias: str, number: int, reason: str) -> Any:
        adapter = self.cluster.adapters[name]
        before = adapter.aliases.get(alias, 0)
        move = adapter_pb2.AliasMove(sequence=len(self.cluster.moves) + 1, alias=alias, to_version=number)
        move.from_version, move.reason, move.actor = before, reason, "user"
        self.cluster.moves.insert(0, move)
        adapter.aliases[alias] = number
        return adapter

    async def UpdateAdapter(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("UpdateAdapter", request, context)
        adapter = self.cluster.adapters[request.adapter.name]
        assert list(request.update_mask.paths) == ["traffic_split"]
        adapter.ClearField("traffic_split")
        if request.adapter.HasField("traffic_split"):
            adapter.traffic_split.CopyFrom(request.adapter.traffic_split)
        return adapter

    async def DeleteAdapterVersion(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("DeleteAdapterVersion", request, context)
        parent, _, number = request.name.partition("/versions/")
        if int(number) in self.cluster.adapters[parent].aliases.values():
            message = f"{request.name} is named by alias production"
            await refuse(context, Fault(grpc.StatusCode.FAILED_PRECONDITION, "VERSION_IN_USE", message))
        del self.cluster.adapter_versions[request.name]
        return empty_pb2.Empty()

    async def ImportAdapterVersion(self, requests: AsyncIterator[Any], context: Any) -> Any:
        header, files, sizes = None, dict[str, bytes](), dict[str, int]()
        async for request in requests:
            if request.HasField("header"):
                header = request.header
                await self.cluster.begin("ImportAdapterVersion", header, context)
                continue
            piece = request.file
            assert len(piece.data) <= 1 << 20
            files[piece.path] = files.get(piece.path, b"") + piece.data
            sizes[piece.path] = piece.size_bytes
        assert sizes == {path: len(data) for path, data in files.items()}
        self.cluster.imported = files
        adapter = self.cluster.adapters.setdefault(header.adapter, adapter_pb2.Adapter(name=header.adapter))
        adapter.latest_version += 1
        version = adapter_pb2.AdapterVersion(name=f"{adapter.name}/versions/{adapter.latest_version}", digest="ef" * 32)
        version.lineage.imported.description = header.description
        return self.cluster.adapter_versions.setdefault(version.name, version)

    async def ListAliasMoves(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListAliasMoves", request, context)
        return adapter_service_pb2.ListAliasMovesResponse(alias_moves=self.cluster.moves)

    async def DownloadAdapterVersion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        fault = await self.cluster.begin("DownloadAdapterVersion", request, context)
        sent, offset = 0, request.offset_bytes
        for path in request.paths:
            data = self.cluster.files[path]
            while offset < len(data) or not data:
                if fault and sent >= fault.after:
                    await refuse(context, fault)
                piece = adapter_service_pb2.DownloadAdapterVersionResponse(path=path, offset_bytes=offset)
                piece.data = data[offset : offset + 4]
                yield piece
                sent += 1
                offset += 4
                if not data:
                    break
            offset = 0


class ExportService(AdapterService):
    """An export of `cluster.files`, done at the third look; `cluster.damaged` bytes are not what their digest says."""

    async def ExportAdapterVersion(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ExportAdapterVersion", request, context)
        self.cluster.export = export_pb2.Export(name="exports/x1", spec=request.spec)
        self.cluster.export.state = training_job_pb2.JOB_STATE_QUEUED
        return self.cluster.export

    async def GetExport(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("GetExport", request, context)
        export = self.cluster.export
        if export.progress < 1:
            export.state, export.progress = training_job_pb2.JOB_STATE_RUNNING, export.progress + 0.5
        elif self.cluster.export_failure is not None:
            export.state = training_job_pb2.JOB_STATE_FAILED
            export.failure.CopyFrom(self.cluster.export_failure)
        elif not export.files:
            export.state = training_job_pb2.JOB_STATE_SUCCEEDED
            export.certificate = self.cluster.certificate
            for path, data in sorted(self.cluster.files.items()):
                digest = hashlib.sha256(data).hexdigest()
                export.files.add(path=path, digest=digest, size_bytes=len(data))
        return export

    async def ListExports(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListExports", request, context)
        return adapter_service_pb2.ListExportsResponse(exports=[self.cluster.export])

    async def DownloadExport(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.cluster.begin("DownloadExport", request, context)
        for path in request.paths:
            data = b"other" if path == self.cluster.damaged else self.cluster.files[path]
            yield adapter_service_pb2.DownloadExportResponse(path=path, offset_bytes=0, data=data)


class EvaluationService(evaluation_service_pb2_grpc.EvaluationServiceServicer):
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    async def CreateEvaluation(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("CreateEvaluation", request, context)
        name = f"evaluations/e{len(self.cluster.evaluations) + 1}"
        made = evaluation_pb2.Evaluation(name=name, spec=request.spec, state=State.JOB_STATE_QUEUED, revision=1)
        made.total_samples = 4
        return self.cluster.evaluations.setdefault(name, made)

    async def GetEvaluation(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("GetEvaluation", request, context)
        return self.cluster.evaluations[request.name]

    async def WatchEvaluation(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.cluster.begin("WatchEvaluation", request, context)
        evaluation = self.cluster.evaluations[request.name]
        for answered in range(5):
            evaluation.state, evaluation.answered_samples = State.JOB_STATE_RUNNING, answered
            evaluation.revision += 1
            yield evaluation_service_pb2.WatchEvaluationResponse(evaluation=evaluation)
        evaluation.metrics.add(metric="exact_match", value=0.75, low=0.3, high=0.95, count=4)
        evaluation.state = self.cluster.end
        yield evaluation_service_pb2.WatchEvaluationResponse(evaluation=evaluation)

    async def ListEvaluations(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListEvaluations", request, context)
        newest = reversed(self.cluster.evaluations.values())
        found = [each for each in newest if request.subject in ("", each.spec.subject)]
        return evaluation_service_pb2.ListEvaluationsResponse(evaluations=found)

    async def CreateJudgement(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("CreateJudgement", request, context)
        return request.judgement

    async def ListSamples(self, request: Any, context: Any) -> Any:
        await self.cluster.begin("ListSamples", request, context)
        samples = self.cluster.samples.get(request.parent, [evaluation_pb2.Sample(index=0, expected="7", answer="1")])
        return evaluation_service_pb2.ListSamplesResponse(samples=samples)


class InferenceService(inference_service_pb2_grpc.InferenceServiceServicer):
    def __init__(self, cluster: FakeCluster, replica: str) -> None:
        self.cluster = cluster
        self.replica = replica

    def served_by(self, request: Any) -> Any:
        self.cluster.answered_by.append(self.replica)
        served = inference_pb2.ServedBy(model="models/tiny", replica=self.replica)
        if request.model.startswith("adapters/"):
            name = request.model.partition("@")[0]
            served.adapter_version = name if "/versions/" in name else f"{name}/versions/1"
        return served

    def words(self, request: Any) -> list[str]:
        pictures = sum(part.HasField("picture") for each in request.prompt.messages for part in each.parts)
        text = "".join(part.text for part in request.prompt.messages[-1].parts)
        return [f"{request.model} ", f"saw {pictures} and ", f"read {text!r}"]

    async def Generate(self, request: Any, context: Any) -> Any:
        await self.cluster.begin(f"Generate@{self.replica}", request, context)
        self.cluster.requests["Generate"].append(request)
        return inference_service_pb2.GenerateResponse(
            text="".join(self.words(request)),
            finish_reason=inference_pb2.FinishReason.FINISH_REASON_STOP,
            served_by=self.served_by(request),
        )

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        fault = await self.cluster.begin(f"StreamGenerate@{self.replica}", request, context)
        for index, word in enumerate(self.words(request)):
            if fault and index >= fault.after:
                await refuse(context, fault)
            await asyncio.sleep(self.cluster.piece_s)
            piece = inference_service_pb2.StreamGenerateResponse(text=word)
            if index in (0, 2):
                piece.served_by.CopyFrom(self.served_by(request))
            if index == 2:
                piece.finish_reason = inference_pb2.FinishReason.FINISH_REASON_STOP
                piece.usage.prompt_tokens, piece.usage.answer_tokens = 11, 3
                piece.timings.total.FromMilliseconds(120)
            yield piece

    async def Score(self, request: Any, context: Any) -> Any:
        await self.cluster.begin(f"Score@{self.replica}", request, context)
        self.cluster.requests["Score"].append(request)
        return inference_service_pb2.ScoreResponse(total_logprob=-1.5, served_by=self.served_by(request))

    async def CountTokens(self, request: Any, context: Any) -> Any:
        await self.cluster.begin(f"CountTokens@{self.replica}", request, context)
        for picture in (part.picture for part in request.prompt.messages[-1].parts if part.HasField("picture")):
            if not picture.data.startswith(b"\x89PNG"):
                message = "prompt.messages[0].parts[0].picture: a picture is a JPEG, PNG or WebP file"
                await refuse(context, Fault(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS", message))
        return inference_service_pb2.CountTokensResponse(total_tokens=42, visual_tokens=9)

    async def ListLoadedAdapters(self, request: Any, context: Any) -> Any:
        await self.cluster.begin(f"ListLoadedAdapters@{self.replica}", request, context)
        loaded = inference_pb2.LoadedAdapter(adapter_version="adapters/digits/versions/1")
        return inference_service_pb2.ListLoadedAdaptersResponse(loaded_adapters=[loaded])

    async def GetModel(self, request: Any, context: Any) -> Any:
        await self.cluster.begin(f"GetModel@{self.replica}", request, context)
        return inference_pb2.ResidentModel(model="models/tiny", replica=self.replica)


@dataclass
class Running:
    """The servers, and where they listen."""

    cluster: FakeCluster
    loop: LoopThread
    addresses: dict[str, str] = field(default_factory=dict)
    servers: dict[str, Any] = field(default_factory=dict)

    def start(self, name: str, *register: Callable[[Any], None]) -> None:
        self.loop.run(self._start, name, register)

    async def _start(self, name: str, register: tuple[Callable[[Any], None], ...]) -> None:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        for each in register:
            each(server)
        port = server.add_insecure_port(self.addresses.get(name, "127.0.0.1:0"))
        self.addresses[name] = f"127.0.0.1:{port}"
        await server.start()
        self.servers[name] = server

    def stop(self, name: str) -> None:
        self.loop.run(self.servers.pop(name).stop, 0)

    def where(self) -> dict[str, Any]:
        """The keyword arguments of a client."""
        inference = [address for name, address in self.addresses.items() if name.startswith("replica")]
        return {
            "dataset": self.addresses["dataset"],
            "trainer": self.addresses["trainer"],
            "inference": inference,
            "token": TOKEN,
        }


@pytest.fixture
def running() -> Iterator[Running]:
    """A fake cluster with two replicas."""
    cluster = FakeCluster()
    running = Running(cluster, LoopThread())
    running.start(
        "dataset",
        lambda server: dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server(DatasetService(cluster), server),
    )
    running.start(
        "trainer",
        lambda server: training_service_pb2_grpc.add_TrainerServiceServicer_to_server(TrainerService(cluster), server),
        lambda server: model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(cluster), server),
        lambda server: adapter_service_pb2_grpc.add_AdapterServiceServicer_to_server(ExportService(cluster), server),
        lambda server: evaluation_service_pb2_grpc.add_EvaluationServiceServicer_to_server(
            EvaluationService(cluster), server
        ),
    )
    for replica in ("replica-1", "replica-2"):
        service = InferenceService(cluster, replica)
        running.start(
            replica,
            lambda server, service=service: inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
                service, server
            ),
        )
    yield running
    for name in list(running.servers):
        running.stop(name)
    running.loop.stop()


@pytest.fixture
def cluster(running: Running) -> FakeCluster:
    return running.cluster


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(**running.where()) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three rows of training, one of test; the test row leaves out the folder, as the tutorial does."""
    root = tmp_path / "digits"
    (root / "images").mkdir(parents=True)
    for number in range(4):
        (root / "images" / f"{number}.png").write_bytes(b"\x89PNG" + bytes([number]) * 50)
    rows = [{"image": f"images/{number}.png", "text": str(number)} for number in range(3)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "test.jsonl").write_text(json.dumps({"image": "3.png", "text": "3"}) + "\n")
    return root


def commands() -> list[EntryPoint]:
    """The client's commands, as `pyproject.toml` registers them: what is installed may be older."""
    registered = tomllib.loads(PROJECT.read_text("utf-8"))["project"]["entry-points"][cli.COMMANDS]
    return [
        EntryPoint(name, at, cli.COMMANDS)
        for name, at in registered.items()
        if at.startswith("veneer_client.commands.")
    ]


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def veneer(running: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command line against the fake cluster, which the environment names."""
    where = running.where()
    monkeypatch.setenv("VENEER_DATASET", where["dataset"])
    monkeypatch.setenv("VENEER_TRAINER", where["trainer"])
    monkeypatch.setenv("VENEER_INFERENCE", ", ".join(where["inference"]))
    monkeypatch.setenv("VENEER_TOKEN", where["token"])
    monkeypatch.setattr(cli, "entry_points", lambda group: commands())

    def run(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["veneer", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(left.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def trained(veneer: Callable[..., Result], folder: Path) -> Callable[..., Result]:
    """The same after a push and a job that published `digits@1`."""
    assert veneer("dataset", "push", folder, "--name", "digits").code == 0
    assert veneer("train", "digits", "--adapter", "digits", "--rank", 16, "--watch").code == 0
    return veneer
