"""AdapterService at the edge: convert, call in a thread, convert back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from veneer.trainer.v1 import adapter_pb2, adapter_service_pb2
from veneer_rpc.calls import serving_call
from veneer_rpc.errors import OutOfRange, Violation, invalid, violations
from veneer_rpc.names import AdapterName, AdapterVersionName, ModelName
from veneer_rpc.paging import Paginator, Query
from veneer_rpc.threads import in_thread
from veneer_trainer.api.adapter_convert import (
    adapter_to_proto,
    changes_to_proto,
    move_to_proto,
    served_from_proto,
    settings_from_proto,
    version_to_proto,
)
from veneer_trainer.api.adapter_import import AdapterImport
from veneer_trainer.api.changes import REGISTRY, Changes, changed
from veneer_trainer.api.downloads import pieces
from veneer_trainer.api.export_calls import ExportCalls
from veneer_trainer.api.job_convert import number_of
from veneer_trainer.api.requests import has_role, request_of
from veneer_trainer.domain.adapters import Adapter, AdapterVersion, AliasMove, version_unknown
from veneer_trainer.domain.canaries import Canaries
from veneer_trainer.domain.exporting import Exports
from veneer_trainer.domain.registry import Adapters, Promotion
from veneer_trainer.domain.replicas import Replica, Replicas
from veneer_trainer.registry_ports import RegistryStore

_pb = adapter_service_pb2
_Context = grpc.aio.ServicerContext[Any, Any]
_LOOK_S = 1.0  # a watcher looks so often by itself, should it miss a wake-up
REPLICA, USER, WORKER = "replica", "user", "worker"

Evaluated = Callable[[str, AdapterVersionName], list[str]]
"""Given a tenant and a version: names of its evaluations, newest first."""


class AdapterServicer(ExportCalls):
    """The methods say what they do in the contract.

    Args:
        adapters: the use cases.
        store: what watchers follow.
        imports: takes folders that were made elsewhere.
        replicas: takes reports.
        canaries: watches over what they report.
        evaluated: evaluations of a version.
        exports: the use cases of exports.
        paginator: makes pages.
        changes: wakes watchers.
    """

    def __init__(
        self,
        adapters: Adapters,
        store: RegistryStore,
        imports: AdapterImport,
        replicas: Replicas,
        canaries: Canaries,
        evaluated: Evaluated,
        exports: Exports,
        paginator: Paginator,
        changes: Changes,
    ) -> None:
        super().__init__(exports, paginator)
        self._adapters = adapters
        self._store = store
        self._imports = imports
        self._replicas = replicas
        self._canaries = canaries
        self._evaluated = evaluated
        self._paginator = paginator
        self._changes = changes

    async def CreateAdapter(  # noqa: D102  # the contract says it
        self, request: _pb.CreateAdapterRequest, context: _Context
    ) -> adapter_pb2.Adapter:
        with violations() as found:
            name = found.attempt(AdapterName.parse, f"adapters/{request.adapter_id}", "adapter_id")
            model = found.attempt(ModelName.parse, request.adapter.model, "adapter.model")
        assert name is not None  # noqa: S101  # or `violations` has raised
        assert model is not None  # noqa: S101  # likewise
        settings, asked = settings_from_proto(request.adapter), request_of(request)
        return adapter_to_proto(await in_thread(self._adapters.create, asked, name, model, settings))

    async def GetAdapter(  # noqa: D102  # the contract says it
        self, request: _pb.GetAdapterRequest, context: _Context
    ) -> adapter_pb2.Adapter:
        name = AdapterName.parse(request.name)
        return adapter_to_proto(await in_thread(self._adapters.get, serving_call().tenant, name))

    async def ListAdapters(  # noqa: D102  # the contract says it
        self, request: _pb.ListAdaptersRequest, context: _Context
    ) -> _pb.ListAdaptersResponse:
        tenant, model = serving_call().tenant, _model(request.model)
        query = Query("ListAdapters", tenant, filter=model)

        def fetch(after: tuple[str | int, ...] | None, limit: int) -> list[Adapter]:
            return self._adapters.page(tenant, str(after[0]) if after else "", limit, model)

        def page() -> _pb.ListAdaptersResponse:
            found = self._paginator.page(
                query, request.page_size, request.page_token, fetch, lambda each: (each.name.adapter,)
            )
            return _pb.ListAdaptersResponse(
                adapters=map(adapter_to_proto, found.items), next_page_token=found.next_page_token
            )

        return await in_thread(page)

    async def UpdateAdapter(  # noqa: D102  # the contract says it
        self, request: _pb.UpdateAdapterRequest, context: _Context
    ) -> adapter_pb2.Adapter:
        name = AdapterName.parse(request.adapter.name, "adapter.name")
        settings, fields = settings_from_proto(request.adapter), tuple(request.update_mask.paths)
        act, asked, etag = self._adapters.update, request_of(request), request.adapter.etag
        return adapter_to_proto(await in_thread(act, asked, name, settings, fields, etag))

    async def DeleteAdapter(  # noqa: D102  # the contract says it
        self, request: _pb.DeleteAdapterRequest, context: _Context
    ) -> Empty:
        name = AdapterName.parse(request.name)
        await in_thread(self._adapters.delete, serving_call().tenant, name, request.etag)
        return Empty()

    async def GetAdapterVersion(  # noqa: D102  # the contract says it
        self, request: _pb.GetAdapterVersionRequest, context: _Context
    ) -> adapter_pb2.AdapterVersion:
        parent, _, version = request.name.partition("/versions/")
        if not version:
            AdapterVersionName.parse(request.name)  # which says what is wrong
        adapter, tenant = AdapterName.parse(parent), serving_call().tenant

        def get() -> adapter_pb2.AdapterVersion:
            name = self._adapters.resolve(tenant, adapter, version)
            return self._version_to_proto(tenant, self._adapters.version(tenant, name))

        return await in_thread(get)

    async def ListAdapterVersions(  # noqa: D102  # the contract says it
        self, request: _pb.ListAdapterVersionsRequest, context: _Context
    ) -> _pb.ListAdapterVersionsResponse:
        parent, tenant = AdapterName.parse(request.parent, "parent"), serving_call().tenant
        query = Query("ListAdapterVersions", tenant, parent=str(parent))

        def fetch(after: tuple[str | int, ...] | None, limit: int) -> list[AdapterVersion]:
            return self._adapters.versions(tenant, parent, number_of(after), limit)

        def page() -> _pb.ListAdapterVersionsResponse:
            found = self._paginator.page(
                query, request.page_size, request.page_token, fetch, lambda each: (each.name.version,)
            )
            versions = [self._version_to_proto(tenant, each) for each in found.items]
            return _pb.ListAdapterVersionsResponse(adapter_versions=versions, next_page_token=found.next_page_token)

        return await in_thread(page)

    def _version_to_proto(self, tenant: str, version: AdapterVersion) -> adapter_pb2.AdapterVersion:
        return version_to_proto(version, self._evaluated(tenant, version.name))

    async def DeleteAdapterVersion(  # noqa: D102  # the contract says it
        self, request: _pb.DeleteAdapterVersionRequest, context: _Context
    ) -> Empty:
        name = AdapterVersionName.parse(request.name)
        await in_thread(self._adapters.delete_version, serving_call().tenant, name)
        return Empty()

    async def DownloadAdapterVersion(  # noqa: D102  # the contract says it
        self, request: _pb.DownloadAdapterVersionRequest, context: _Context
    ) -> AsyncIterator[_pb.DownloadAdapterVersionResponse]:
        name, tenant = AdapterVersionName.parse(request.name), serving_call().tenant
        if request.tenant and (has_role(REPLICA) or has_role(WORKER)):
            tenant = request.tenant
        elif request.tenant not in ("", tenant):
            raise version_unknown(name)
        for_work = not has_role(REPLICA) and not (has_role(USER) and tenant == serving_call().tenant)
        files, opened = await in_thread(self._adapters.open, tenant, name, tuple(request.paths), for_work)
        try:
            async for file, offset, data in pieces(files, opened.read, request.offset_bytes):
                yield _pb.DownloadAdapterVersionResponse(path=file.path, offset_bytes=offset, data=data)
        finally:
            opened.close()

    async def ImportAdapterVersion(  # noqa: D102  # the contract says it
        self, requests: AsyncIterator[_pb.ImportAdapterVersionRequest], context: _Context
    ) -> adapter_pb2.AdapterVersion:
        return version_to_proto(await self._imports.receive(requests))

    async def PromoteAdapterVersion(  # noqa: D102  # the contract says it
        self, request: _pb.PromoteAdapterVersionRequest, context: _Context
    ) -> adapter_pb2.Adapter:
        promotion = Promotion(
            AdapterVersionName.parse(request.name),
            request.alias,
            request.condition,
            request.expected_version if request.HasField("expected_version") else None,
            request.reason,
        )
        return adapter_to_proto(await in_thread(self._adapters.promote, request_of(request), promotion))

    async def RollbackAdapter(  # noqa: D102  # the contract says it
        self, request: _pb.RollbackAdapterRequest, context: _Context
    ) -> adapter_pb2.Adapter:
        name, act = AdapterName.parse(request.name), self._adapters.rollback
        return adapter_to_proto(await in_thread(act, request_of(request), name, request.alias, request.reason))

    async def DeleteAlias(  # noqa: D102  # the contract says it
        self, request: _pb.DeleteAliasRequest, context: _Context
    ) -> adapter_pb2.Adapter:
        name, act = AdapterName.parse(request.adapter, "adapter"), self._adapters.delete_alias
        return adapter_to_proto(await in_thread(act, request_of(request), name, request.alias))

    async def ListAliasMoves(  # noqa: D102  # the contract says it
        self, request: _pb.ListAliasMovesRequest, context: _Context
    ) -> _pb.ListAliasMovesResponse:
        parent, tenant = AdapterName.parse(request.parent, "parent"), serving_call().tenant
        query = Query("ListAliasMoves", tenant, parent=str(parent))

        def fetch(after: tuple[str | int, ...] | None, limit: int) -> list[AliasMove]:
            return self._adapters.moves(tenant, parent, number_of(after), limit)

        def page() -> _pb.ListAliasMovesResponse:
            found = self._paginator.page(
                query, request.page_size, request.page_token, fetch, lambda each: (each.sequence,)
            )
            return _pb.ListAliasMovesResponse(
                alias_moves=map(move_to_proto, found.items), next_page_token=found.next_page_token
            )

        return await in_thread(page)

    async def WatchAdapters(  # noqa: D102  # the contract says it
        self, request: _pb.WatchAdaptersRequest, context: _Context
    ) -> AsyncIterator[_pb.WatchAdaptersResponse]:
        told, model = request.after_revision, _model(request.model)
        tenant = "" if has_role(REPLICA) else serving_call().tenant
        if told < 0:
            raise invalid(Violation("after_revision", "OUT_OF_RANGE", f"must be 0 or more, was {told}"))
        now = await in_thread(self._store.revision)
        if told > now:
            raise OutOfRange("REVISION_UNKNOWN", f"the registry is at revision {now}, not yet at {told}")
        snapshot = told == 0
        with self._changes.of(REGISTRY) as event:
            while True:
                event.clear()
                found = await in_thread(self._store.changes, told, tenant, model)
                if snapshot or found.adapters or found.deleted:
                    yield changes_to_proto(found, snapshot)
                told, snapshot = found.revision, False
                await changed(event, _LOOK_S)

    async def ReportServing(  # noqa: D102  # the contract says it
        self, request: _pb.ReportServingRequest, context: _Context
    ) -> _pb.ReportServingResponse:
        with violations() as found:
            model = found.attempt(ModelName.parse, request.model, "model")
            replica = Replica(
                request.replica, request.address, str(model or ""), request.draining, request.revision,
                tuple((each.tenant, each.adapter_version, each.digest) for each in request.served_adapters),
            )  # fmt: skip
            replica.check(found)
            reports = served_from_proto(request.served_adapters, found)
        self._replicas.report(replica)
        for tenant, version, figures in reports:
            await in_thread(self._canaries.report, tenant, version, figures)
        return _pb.ReportServingResponse(revision=await in_thread(self._store.revision))


def _model(text: str) -> str:
    return str(ModelName.parse(text, "model")) if text else ""
