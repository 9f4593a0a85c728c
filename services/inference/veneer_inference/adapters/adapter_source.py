"""Adapters from the trainer, by tenant and name, onto this replica's disk."""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from veneer.trainer.v1 import adapter_service_pb2
from veneer_inference.adapters.adapter_folders import CONFIG_FILE, AdapterFolder, AdapterFolders, FolderError
from veneer_inference.domain.registry import Release
from veneer_rpc.errors import FailedPrecondition, NotFound, Unavailable, VeneerError
from veneer_rpc.names import AdapterVersionName
from veneer_rpc.status import from_rpc_error
from veneer_rpc.threads import in_thread

if TYPE_CHECKING:
    from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceAsyncStub

RETRY_S = 2.0
_TIMEOUT_S = 600.0
_CHECK_TIMEOUT_S = 5.0

_T = TypeVar("_T")


class AdapterSource:
    """Fetches what is not on the disk yet; calls at once for one version share one download.

    Args:
        stub: of the trainer.
        folders: the disk.
        most_bytes: of one adapter.
    """

    def __init__(self, stub: "AdapterServiceAsyncStub", folders: AdapterFolders, most_bytes: int) -> None:
        self._stub = stub
        self._folders = folders
        self._most_bytes = most_bytes
        self._downloads: dict[tuple[str, AdapterVersionName], asyncio.Task[AdapterFolder]] = {}

    async def folder(self, release: Release) -> AdapterFolder:
        """The adapter's folder; `release.digest` may be empty, where only the name is known.

        Raises:
            NotFound: the trainer has no such version.
            FailedPrecondition: what it sends is no adapter, or not the one that the registry names.
            Unavailable: the trainer is away.
        """
        if release.digest:
            found = await in_thread(self._folders.find, release.digest)
            if found is not None:
                return found
        key = release.tenant, release.version
        task = self._downloads.get(key)
        if task is None:
            task = self._downloads[key] = apart(self._download(release))
            task.add_done_callback(lambda _: self._downloads.pop(key, None))
        return await asyncio.shield(task)

    async def exists(self, release: Release) -> bool:
        """Asks the trainer whether a version is still there.

        Raises:
            VeneerError: the trainer is away, or refuses.
        """
        try:
            async for _ in self._pieces(release, [CONFIG_FILE], _CHECK_TIMEOUT_S):
                pass
        except NotFound:
            return False
        return True

    async def discard(self, digest: str) -> None:
        """Deletes a folder that has turned out wrong."""
        await in_thread(self._folders.delete, digest)

    async def trim(self, in_use: set[str]) -> None:
        """Makes room on the disk."""
        await in_thread(self._folders.trim, in_use)

    async def _download(self, release: Release) -> AdapterFolder:
        incoming = await in_thread(self._folders.incoming, self._most_bytes)
        try:
            async for piece in self._pieces(release, [], _TIMEOUT_S):
                await in_thread(incoming.write, piece.path, piece.offset_bytes, piece.data)
            await in_thread(incoming.sync)
            return await in_thread(self._folders.keep, incoming, release.digest)
        except FolderError as error:
            raise invalid_adapter(release.version, [str(error)]) from error
        finally:
            await in_thread(incoming.close)

    async def _pieces(
        self, release: Release, paths: list[str], timeout_s: float
    ) -> AsyncIterator[adapter_service_pb2.DownloadAdapterVersionResponse]:
        request = adapter_service_pb2.DownloadAdapterVersionRequest(
            name=str(release.version), tenant=release.tenant, paths=paths
        )
        call = self._stub.DownloadAdapterVersion(request, timeout=timeout_s)
        try:
            async for piece in call:
                yield piece
        except grpc.aio.AioRpcError as error:
            problem = from_rpc_error(error)
            if isinstance(problem, NotFound):
                raise problem from None
            raise trainer_away(problem) from None
        finally:
            call.cancel()


def trainer_away(problem: VeneerError) -> Unavailable:
    """The error for what cannot be known or fetched while the trainer does not answer."""
    return Unavailable(
        "REGISTRY_UNAVAILABLE",
        f"the trainer, which has the registry of adapters, does not answer ({problem.reason})",
        retry_after_s=RETRY_S,
    )


def invalid_adapter(version: AdapterVersionName, problems: "list[str]") -> FailedPrecondition:
    """The error for an adapter that cannot be served, with the reasons."""
    return FailedPrecondition(
        "ADAPTER_INVALID",
        f"{version} cannot be served: {'; '.join(problems)}",
        metadata={f"problem_{index}": problem for index, problem in enumerate(problems)},
        resource=str(version),
    )


def apart(work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
    """Starts work that outlives the call that asked for it, and is not bound to that call's deadline."""
    task = asyncio.create_task(work, context=contextvars.Context())
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if nobody waits any more
    return task
