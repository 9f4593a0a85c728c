"""Adapters: versions, aliases, and their files."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.trainer.v1.adapter_pb2 import Adapter, AdapterVersion, AliasMove, RollbackPolicy, TrafficSplit
from veneer.trainer.v1.adapter_service_pb2 import (
    DeleteAdapterRequest,
    DeleteAdapterVersionRequest,
    DeleteAliasRequest,
    DownloadAdapterVersionRequest,
    GetAdapterRequest,
    GetAdapterVersionRequest,
    ImportHeader,
    ListAdaptersRequest,
    ListAdapterVersionsRequest,
    ListAliasMovesRequest,
    PromoteAdapterVersionRequest,
    RollbackAdapterRequest,
    UpdateAdapterRequest,
)
from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceStub
from veneer_client import _files, _peft
from veneer_client._calls import STREAM_TIMEOUT_S, Connection, Patience
from veneer_client._errors import StatusError
from veneer_client._models import AsyncModels
from veneer_client._names import full, version

if TYPE_CHECKING:  # the generated code has it in its type stubs alone
    from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceAsyncStub


class AsyncAdapters:
    """Adapters and their versions."""

    def __init__(self, trainer: Connection, models: AsyncModels) -> None:
        self._trainer = trainer
        self._models = models

    def _stub(self) -> "AdapterServiceAsyncStub":
        return self._trainer.stub(AdapterServiceStub)

    async def get(self, name: str) -> Adapter:
        """Returns an adapter."""
        return await self._trainer.read(self._stub().GetAdapter, GetAdapterRequest(name=full("adapters", name)))

    async def list(self, *, model: str = "") -> AsyncIterator[Adapter]:
        """Yields adapters, by name; only those of one base when given."""
        request = ListAdaptersRequest(model=full("models", model) if model else "")
        async for item in self._trainer.pages(self._stub().ListAdapters, request, lambda page: page.adapters):
            yield item

    async def get_version(self, name: str) -> AdapterVersion:
        """Returns a version: `digits@3` by number, `digits@canary` by alias, `digits` is production's."""
        whole = version("adapters", name if "@" in name or "/versions/" in name else f"{name}@production")
        return await self._trainer.read(self._stub().GetAdapterVersion, GetAdapterVersionRequest(name=whole))

    async def versions(self, name: str) -> AsyncIterator[AdapterVersion]:
        """Yields an adapter's versions, newest first."""
        request = ListAdapterVersionsRequest(parent=full("adapters", name))
        async for item in self._trainer.pages(
            self._stub().ListAdapterVersions, request, lambda page: page.adapter_versions
        ):
            yield item

    async def promote(
        self,
        name: str,
        version: int,
        *,
        alias: str = "",
        condition: str = "",
        expected_version: int | None = None,
        reason: str = "",
    ) -> Adapter:
        """Points an alias at a version, atomically; replicas answer by it from then on.

        Args:
            name: the adapter.
            version: its version's number.
            alias: Default: `production`.
            condition: a gate over the version's evaluations, such as `exact_match >= 0.9`.
            expected_version: where the alias must point now, 0 for nowhere. Default: not checked.
            reason: for the history.
        """
        request = PromoteAdapterVersionRequest(
            name=f"{full('adapters', name)}/versions/{version}",
            alias=alias,
            condition=condition,
            expected_version=expected_version,
            reason=reason,
        )
        return await self._trainer.change(self._stub().PromoteAdapterVersion, request)

    async def rollback(self, name: str, *, alias: str = "", reason: str = "") -> Adapter:
        """Points an alias (`production` by default) back at the version before."""
        request = RollbackAdapterRequest(name=full("adapters", name), alias=alias, reason=reason)
        return await self._trainer.change(self._stub().RollbackAdapter, request)

    async def canary(
        self,
        name: str,
        version: int,
        share: float,
        *,
        alias: str = "canary",
        min_answers: int = 0,
        max_error_rate: float | None = None,
        max_latency_ratio: float | None = None,
        min_judgement: float | None = None,
        condition: str = "",
        reason: str = "",
    ) -> Adapter:
        """Gives a version a share of the requests that name the adapter alone, and bounds for taking it back.

        When a bound is passed the share goes, and the alias points where `production` does.

        Args:
            name: the adapter.
            version: its version's number.
            share: of the requests, 0 to 1; a `routing_key` always falls on the same side.
            alias: the alias that the version takes.
            min_answers: from how many on a bound is judged. Default: 50.
            max_error_rate: greatest share of failed requests. Default: not judged.
            max_latency_ratio: greatest ratio of its latency (p95) to production's. Default: not judged.
            min_judgement: least mean of people's judgements, 0 to 1. Default: not judged.
            condition: as in `promote`.
            reason: for the history.
        """
        await self.promote(name, version, alias=alias, condition=condition, reason=reason)
        policy = RollbackPolicy(
            min_answers=min_answers,
            max_error_rate=max_error_rate,
            max_latency_ratio=max_latency_ratio,
            min_judgement=min_judgement,
        )
        return await self._split(name, TrafficSplit(alias=alias, share=share, rollback=policy))

    async def end_canary(self, name: str) -> Adapter:
        """Takes back the share of the requests that another alias has; the alias stays."""
        return await self._split(name, None)

    async def _split(self, name: str, split: TrafficSplit | None) -> Adapter:
        request = UpdateAdapterRequest(adapter=Adapter(name=full("adapters", name), traffic_split=split))
        request.update_mask.paths.append("traffic_split")
        return await self._trainer.change(self._stub().UpdateAdapter, request)

    async def delete_alias(self, name: str, alias: str) -> Adapter:
        """Removes an alias; its version stays."""
        request = DeleteAliasRequest(adapter=full("adapters", name), alias=alias)
        return await self._trainer.change(self._stub().DeleteAlias, request)

    async def import_folder(
        self,
        folder: str | Path,
        name: str,
        *,
        model: str | None = None,
        max_pixels: int = 0,
        description: str = "",
        request_id: str = "",
    ) -> AdapterVersion:
        """Publishes a PEFT folder that was made elsewhere as an adapter's next version.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            name: the adapter; created when it does not exist.
            model: the base it was trained on. Default: the only one there is.
            max_pixels: bound on a picture's area that it was trained with. Default: the service's.
            description: where it comes from.
            request_id: a UUID of yours. Default: made here.

        Raises:
            FolderError: it is no such folder.
            FailedPrecondition: it does not fit the base; the text has every objection.
        """
        files = await asyncio.to_thread(_peft.files_of, Path(folder))
        header = ImportHeader(
            adapter=full("adapters", name),
            model=await self._models.name_or_only(model),
            max_pixels=max_pixels,
            description=description,
            request_id=request_id or str(uuid.uuid4()),
        )
        patience = Patience(STREAM_TIMEOUT_S)
        while True:
            try:
                method = self._stub().ImportAdapterVersion
                return await self._trainer.send(method, _peft.pieces(header, files), patience.left_s())
            except StatusError as error:
                await patience.wait(error)

    async def log(self, name: str) -> AsyncIterator[AliasMove]:
        """Yields who moved which alias, newest first."""
        request = ListAliasMovesRequest(parent=full("adapters", name))
        async for item in self._trainer.pages(self._stub().ListAliasMoves, request, lambda page: page.alias_moves):
            yield item

    async def download(self, name: str, folder: str | Path) -> Path:
        """Writes a version's files into a folder for `PeftModel.from_pretrained`, and returns the folder.

        A broken download goes on where it was.

        Args:
            name: as in `get_version`.
            folder: created where it does not exist; files of the same names are replaced.
        """
        found = await self.get_version(name)

        def stream(paths: Sequence[str], offset: int, timeout_s: float) -> AsyncIterator[_files.Piece]:
            request = DownloadAdapterVersionRequest(name=found.name, paths=paths, offset_bytes=offset)
            return self._trainer.stream(self._stub().DownloadAdapterVersion, request, timeout_s)

        await _files.download(found.files, Path(folder), stream)
        return Path(folder)

    async def delete(self, name: str) -> None:
        """Deletes an adapter and its versions."""
        await self._trainer.change(self._stub().DeleteAdapter, DeleteAdapterRequest(name=full("adapters", name)))

    async def delete_version(self, name: str) -> None:
        """Deletes a version, such as `digits@3`."""
        request = DeleteAdapterVersionRequest(name=version("adapters", name))
        await self._trainer.change(self._stub().DeleteAdapterVersion, request)
