"""Adapters: versions, aliases, and their files."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.trainer.v1.adapter_pb2 import Adapter, AdapterVersion, AliasMove
from veneer.trainer.v1.adapter_service_pb2 import (
    DeleteAdapterRequest,
    DeleteAdapterVersionRequest,
    DownloadAdapterVersionRequest,
    GetAdapterRequest,
    GetAdapterVersionRequest,
    ListAdaptersRequest,
    ListAdapterVersionsRequest,
    ListAliasMovesRequest,
    PromoteAdapterVersionRequest,
    RollbackAdapterRequest,
)
from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceStub
from veneer_client import _files
from veneer_client._calls import Connection
from veneer_client._names import full, version

if TYPE_CHECKING:  # the generated code has it in its type stubs alone
    from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceAsyncStub


class AsyncAdapters:
    """Adapters and their versions."""

    def __init__(self, trainer: Connection) -> None:
        self._trainer = trainer

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
