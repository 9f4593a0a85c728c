"""Keeps the registry's copy up to date: a stream of changes from the trainer, taken up again where it broke."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from veneer.trainer.v1 import adapter_pb2, adapter_service_pb2
from veneer_inference.adapters.registry_file import RegistryFile
from veneer_inference.domain.registry import Registry, Release, Served, Split
from veneer_rpc.errors import DeadlineExceeded, InvalidArgument, OutOfRange
from veneer_rpc.names import AdapterName, AdapterVersionName
from veneer_rpc.status import from_rpc_error
from veneer_rpc.threads import in_thread

if TYPE_CHECKING:
    from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceAsyncStub

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_log = structlog.get_logger(__name__)


class Follower:
    """Follows the registry for one base.

    Args:
        stub: of the trainer.
        registry: the copy to keep.
        file: where it is kept over a restart.
        model: `models/{model}`, whose adapters are followed.
        changed: is called after each change, on the event loop.
    """

    def __init__(
        self,
        stub: "AdapterServiceAsyncStub",
        registry: Registry,
        file: RegistryFile,
        model: str,
        changed: Callable[[], None],
    ) -> None:
        self._stub = stub
        self._registry = registry
        self._file = file
        self._model = model
        self._changed = changed
        self._hurry = asyncio.Event()
        self._unsaved = asyncio.Event()
        self._call: grpc.aio.UnaryStreamCall[Any, Any] | None = None
        self._stale = True

    async def run(self) -> None:
        """Follows for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._save())

    async def catch_up(self) -> None:
        """Brings the copy to the trainer's present state, without waiting for the stream.

        Raises:
            VeneerError: the trainer is away.
        """
        call = self._stub.WatchAdapters(adapter_service_pb2.WatchAdaptersRequest(model=self._model))
        try:
            async for message in call:
                self._take(message)
                break
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()
        self._hurry.set()  # the trainer is there: the stream need not wait any longer

    def start_over(self) -> None:
        """Asks for a snapshot: the registry has gone back, as after a restore."""
        self._stale = True
        if self._call is not None:
            self._call.cancel()

    def save(self) -> None:
        """Keeps the copy as it is now, soon."""
        self._unsaved.set()

    async def _follow(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                async for message in self._messages():
                    self._take(message)
                    wait_s = _FIRST_WAIT_S
            except OutOfRange:
                refused_snapshot, self._stale = self._stale, True
                if not refused_snapshot:
                    continue
            except DeadlineExceeded:
                continue  # the stream's own time was over
            except Exception as error:  # whatever went wrong, following goes on
                _log.warning("registry is not followed", problem=repr(error), retry_s=round(wait_s, 2))
            self._hurry.clear()
            pause_s = wait_s * (0.5 + random.random() / 2)  # noqa: S311  # so that replicas come back apart
            try:
                async with asyncio.timeout(pause_s):
                    await self._hurry.wait()
            except TimeoutError:
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    async def _messages(self) -> AsyncIterator[adapter_service_pb2.WatchAdaptersResponse]:
        request = adapter_service_pb2.WatchAdaptersRequest(
            after_revision=0 if self._stale else self._registry.revision, model=self._model
        )
        call = self._call = self._stub.WatchAdapters(request)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return  # `start_over` ended the call, not this task
        finally:
            call.cancel()
            self._call = None

    def _take(self, message: adapter_service_pb2.WatchAdaptersResponse) -> None:
        if self._stale and not message.snapshot:
            return
        if not self._stale and message.revision < self._registry.revision:
            return  # the stream lags behind a `catch_up`: what it says is over
        served = list(_adapters(message.adapters))
        if message.snapshot:
            self._registry.replace(message.revision, served)
            self._stale = False
        else:
            gone = [(each.tenant, AdapterName.parse(each.adapter).adapter) for each in message.deleted_adapters]
            self._registry.change(message.revision, served, gone)
        _log.info("registry moved", revision=message.revision, snapshot=message.snapshot, adapters=len(served))
        self.save()
        self._changed()

    async def _save(self) -> None:
        while True:
            await self._unsaved.wait()
            self._unsaved.clear()
            try:
                await in_thread(self._file.write, self._file.document(self._registry))
            except OSError as error:
                _log.error("the registry's copy cannot be kept", problem=error.strerror)


def _adapters(messages: Iterable[adapter_pb2.ServingAdapter]) -> Iterator[Served]:
    for each in messages:
        try:
            yield _served(each)
        except InvalidArgument as error:
            _log.error("an adapter of the registry cannot be read", adapter=each.adapter, problem=error.message)


def _served(message: adapter_pb2.ServingAdapter) -> Served:
    aliases = {
        each.alias: Release(
            message.tenant, AdapterVersionName.parse(each.adapter_version, "adapter_version"), each.digest
        )
        for each in message.aliases
    }
    split = None
    if message.HasField("traffic_split"):
        split = Split(message.traffic_split.alias, message.traffic_split.share)
    return Served(message.tenant, AdapterName.parse(message.adapter).adapter, aliases, split, message.preload)
