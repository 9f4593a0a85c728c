"""Calls about versions, their findings and holds."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from google.protobuf.empty_pb2 import Empty

from veneer.dataset.v1 import dataset_pb2, dataset_service_pb2
from veneer_dataset.api.app import App, request_key, tenant
from veneer_dataset.api.convert import (
    finding_message,
    hold_message,
    progress_message,
    version_message,
    version_name,
)
from veneer_dataset.api.handover import drawn
from veneer_dataset.api.requests import VersionPrefix, version_request
from veneer_dataset.api.works import Running
from veneer_dataset.domain.datasets import now
from veneer_dataset.domain.findings import Finding, Severity
from veneer_dataset.domain.freezing import FIRST_FINDINGS, Order
from veneer_dataset.domain.making import Submission
from veneer_dataset.domain.versions import DatasetVersion, StoredVersion, new_hold
from veneer_rpc.errors import Violation, invalid
from veneer_rpc.idempotency import RequestKey, body_sha256
from veneer_rpc.names import DatasetName, DatasetVersionName
from veneer_rpc.paging import Query
from veneer_rpc.threads import in_thread

_Response = dataset_service_pb2.CreateDatasetVersionResponse


class VersionCalls:
    """See the contract."""

    _app: App

    async def CreateDatasetVersion(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.CreateDatasetVersionRequest, context: object
    ) -> AsyncIterator[_Response]:
        key = request_key(request.request_id) if request.request_id else None
        digest = body_sha256(request)
        if key is not None:
            kept = await in_thread(self._app.requests.find, key, digest)
            if kept is not None:
                async for response in self._again(DatasetVersionName.parse(kept.decode())):
                    yield response
                return
        running = self._app.works.joined(key, digest) if key else None
        if running is None:
            order = await self._order(request)
            running = self._app.works.joined(key, digest) if key else None  # while we asked for the model
            running = running or self._app.works.start(order, key, digest, self._remember(order, key, digest))
        async for position in self._app.works.positions(running):
            yield _Response(progress=progress_message(position))
        try:
            async for response in self._outcome(running):
                yield response
        finally:
            await self._app.works.leave(running)

    async def GetDatasetVersion(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.GetDatasetVersionRequest, context: object
    ) -> dataset_pb2.DatasetVersion:
        name = VersionPrefix.parse(request.name)
        stored = await in_thread(self._app.versions.get, tenant(), name.dataset, name.version)
        return version_message(stored.version)

    async def ListDatasetVersions(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.ListDatasetVersionsRequest, context: object
    ) -> dataset_service_pb2.ListDatasetVersionsResponse:
        name, whose = DatasetName.parse(request.parent, "parent"), tenant()
        page = await in_thread(
            self._app.pages.page,
            Query("ListDatasetVersions", whose, str(name)),
            request.page_size,
            request.page_token,
            lambda after, limit: self._app.versions.page(whose, name.dataset, int(after[0]) if after else None, limit),
            lambda stored: (stored.key,),
        )
        return dataset_service_pb2.ListDatasetVersionsResponse(
            dataset_versions=[version_message(stored.version) for stored in page.items],
            next_page_token=page.next_page_token,
        )

    async def DeleteDatasetVersion(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.DeleteDatasetVersionRequest, context: object
    ) -> Empty:
        name = DatasetVersionName.parse(request.name)
        await in_thread(self._app.versions.delete, tenant(), name.dataset, name.version, now())
        return Empty()

    async def ListFindings(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.ListFindingsRequest, context: object
    ) -> dataset_service_pb2.ListFindingsResponse:
        if request.severity not in dataset_pb2.Severity.values():
            raise invalid(Violation("severity", "UNKNOWN", f"must be a known severity, was {request.severity}"))
        stored = await self._stored(request.parent, "parent")
        severity = Severity(request.severity) if request.severity else None
        page = await in_thread(
            self._app.finding_pages.page,
            Query("ListFindings", tenant(), request.parent, f"{request.severity}/{request.code}"),
            request.page_size,
            request.page_token,
            lambda after, limit: self._app.versions.findings(
                stored.key, severity, request.code, int(after[0]) if after else 0, limit
            ),
            lambda item: (item[0],),
        )
        return dataset_service_pb2.ListFindingsResponse(
            findings=[finding_message(finding) for _, finding in page.items],
            next_page_token=page.next_page_token,
        )

    async def PlaceHold(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.PlaceHoldRequest, context: object
    ) -> dataset_pb2.Hold:
        moment = now()
        expires = request.expire_time.ToDatetime(moment.tzinfo) if request.HasField("expire_time") else None
        hold = new_hold(request.holder, expires, moment)
        stored = await self._stored(request.dataset_version, "dataset_version")
        await in_thread(self._app.versions.place_hold, stored.key, hold)
        return hold_message(request.dataset_version, hold)

    async def ReleaseHold(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.ReleaseHoldRequest, context: object
    ) -> Empty:
        stored = await self._stored(request.dataset_version, "dataset_version")
        await in_thread(self._app.versions.release_hold, stored.key, request.holder)
        return Empty()

    async def _stored(self, text: str, field: str) -> StoredVersion:
        name = DatasetVersionName.parse(text, field)
        return await in_thread(self._app.versions.get, tenant(), name.dataset, name.version)

    async def _order(self, request: dataset_service_pb2.CreateDatasetVersionRequest) -> Order:
        checked = version_request(request)
        whose = tenant()
        dataset = await in_thread(self._app.datasets.get, whose, checked.dataset.dataset)
        counting = await self._app.models.counting(checked.model, request.max_pixels) if checked.model else None
        return Order(
            tenant=whose,
            dataset_id=dataset.dataset_id,
            submission=Submission(
                checked.row_files, request.picture_manifest, checked.fractions, dataset.default_prompt
            ),
            counting=counting,
            strict=request.strict,
            validate_only=request.validate_only,
            labels=dict(request.labels),
        )

    def _remember(self, order: Order, key: RequestKey | None, digest: bytes) -> Callable[[DatasetVersion], None]:
        def remember(version: DatasetVersion) -> None:
            if key is not None and not order.validate_only:
                name = version_name(version.dataset_id, version.digest)
                self._app.requests.remember(key, digest, name.encode())

        return remember

    async def _outcome(self, running: Running) -> AsyncIterator[_Response]:
        """Findings, then the version or what stood in its way."""
        async for some in drawn(running.work.findings):
            yield _findings(some)
        version = await asyncio.shield(running.done)
        yield _Response(dataset_version=version_message(version))

    async def _again(self, name: DatasetVersionName) -> AsyncIterator[_Response]:
        """What a request that was done before was answered."""
        stored = await in_thread(self._app.versions.get, tenant(), name.dataset, name.version)
        found = await in_thread(self._app.versions.findings, stored.key, None, "", 0, FIRST_FINDINGS)
        if found:
            yield _findings(finding for _, finding in found)
        yield _Response(dataset_version=version_message(stored.version))


def _findings(findings: Iterable[Finding]) -> _Response:
    return _Response(findings=dataset_service_pb2.FindingBatch(findings=[finding_message(each) for each in findings]))
