"""A replica: the parts wired together, from settings and a way to start an engine to a server that answers."""

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import structlog

from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer.inference.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceStub
from veneer_inference.adapters.adapter_folders import AdapterFolders
from veneer_inference.adapters.adapter_source import AdapterSource
from veneer_inference.adapters.blobs import Blobs
from veneer_inference.adapters.follower import Follower
from veneer_inference.adapters.metrics_page import MetricsPage
from veneer_inference.adapters.registry_file import RegistryFile
from veneer_inference.adapters.reporter import Reporter
from veneer_inference.admission import Admission
from veneer_inference.alone import NoBlobs, NoRegistry, NoSource
from veneer_inference.api.adapter_list import AdapterList
from veneer_inference.api.answers import Answers
from veneer_inference.api.prompts import Prompts
from veneer_inference.api.servicer import InferenceServicer
from veneer_inference.authentication import DelegatingAuthenticator
from veneer_inference.base import BaseKeeper, StartEngine
from veneer_inference.desired import Desired
from veneer_inference.domain.figures import FiguresByVersion
from veneer_inference.domain.registry import Registry
from veneer_inference.metrics import Metrics
from veneer_inference.ports import EngineInfo, EngineStats
from veneer_inference.residency import Residency
from veneer_inference.settings import InferenceSettings
from veneer_rpc.channel import open_channel
from veneer_rpc.delegation import DelegationVerifier
from veneer_rpc.errors import Unavailable, VeneerError
from veneer_rpc.paging import Paginator
from veneer_rpc.server import Server
from veneer_rpc.threads import in_thread
from veneer_rpc.tokens import TokenFile

SERVICE = "veneer.inference.v1.InferenceService"

_PAGING_KEY_BYTES = 32
_TELL_S = 1.0  # a trainer that hangs does not hold up a stop for longer
_log = structlog.get_logger(__name__)


class Replica:
    """One replica of the inference service; made on the event loop that serves it.

    Args:
        settings: validated.
        start_engine: starts an engine, again when one dies.

    Raises:
        TokenFileError: the tokens cannot be read.
    """

    def __init__(self, settings: InferenceSettings, start_engine: StartEngine) -> None:
        settings.data.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._channels: list[grpc.aio.Channel] = []
        self._registry: Registry | None = None
        self._follower: Follower | None = None
        self._reporter: Reporter | None = None
        self._desired: Desired | None = None
        self._keeper = BaseKeeper(
            settings.model_name, settings.model_directory, start_engine, self._serving, own_bounds=settings.alone
        )
        figures = FiguresByVersion()
        admission, residency = self._adapters(settings, figures)
        self._metrics = Metrics(self._engine_now, lambda: residency.held)
        if self._registry is not None:
            self._metrics.followed(self._registry)
        self._metrics_page = MetricsPage(self._metrics.snapshot)
        self._metrics_port = settings.metrics_port
        self._prompts = Prompts(self._blobs(settings), settings.prompt_threads, settings.max_prompts_waiting)
        answers = Answers(lambda: self._keeper.current, admission, residency, self._prompts, figures, self._metrics)
        adapters = AdapterList(admission, residency, Paginator(secrets.token_bytes(_PAGING_KEY_BYTES)))
        servicer = InferenceServicer(answers, adapters, settings.replica)
        register = partial(add_InferenceServiceServicer_to_server, servicer)
        self._server = _DrainingServer(settings, [register], _authenticator(settings))
        self._server.draining = self._drain
        self._tasks: list[asyncio.Task[None]] = []
        self.metrics_address = ""

    async def start(self) -> str:
        """Listens, follows the registry, and returns the address once a token has come out of the engine.

        Raises:
            BindError: the address cannot be listened on.
            Exception: the first engine could not be started.
        """
        if self._metrics_port is not None:
            self.metrics_address = await self._metrics_page.start(self._metrics_port)
            _log.info("metrics", address=self.metrics_address)
        address = await self._server.start()
        if self._reporter is not None:
            self._reporter.address = self._settings.advertise or address
        if self._follower is not None:
            self._begin(self._follower.run())
        started = asyncio.Event()
        keeping = asyncio.create_task(self._keeper.run(started.set))
        self._tasks.append(keeping)
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait({keeping, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if keeping.done():
            await keeping
        keeping.add_done_callback(_told)
        for part in (self._reporter, self._desired):
            if part is not None:
                self._begin(part.run())
        return address

    async def run(self) -> None:
        """Serves until a signal asks to stop, and drains."""
        await self._server.run()

    async def stop(self) -> None:
        """Drains, without a signal."""
        await self._server.stop()

    async def close(self) -> None:
        """Ends everything that was begun; the engine too."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._metrics_page.close()
        await in_thread(self._prompts.close)
        for channel in self._channels:
            await channel.close()

    def _adapters(self, settings: InferenceSettings, figures: FiguresByVersion) -> tuple[Admission, Residency]:
        """What finds adapters and holds them; follows the registry where there is one."""
        if settings.trainer is None or settings.trainer_token_file is None:
            return NoRegistry(), Residency(lambda: self._keeper.current, NoSource())
        channel = open_channel(
            settings.trainer,
            settings.trainer_token_file.read_text("utf-8").strip(),
            root_certificates_pem=_pem(settings.trainer_root_certificates_file),
        )
        self._channels.append(channel)
        stub, model = AdapterServiceStub(channel), str(settings.model_name)
        file = RegistryFile(settings.data / "registry.json", model)
        registry = self._registry = file.load()
        folders = AdapterFolders(settings.data / "adapters", settings.adapter_disk_bytes)
        source = AdapterSource(stub, folders, settings.max_adapter_bytes)
        residency = Residency(lambda: self._keeper.current, source)
        self._desired = Desired(registry, residency, settings.report_s)
        self._follower = Follower(stub, registry, file, model, self._registry_changed)
        self._reporter = Reporter(
            stub, settings.replica, model, registry, figures, lambda: residency.held,
            self._follower.start_over, settings.report_s,
        )  # fmt: skip
        admission = Admission(registry, self._follower, source, settings.registry_wait_s, settings.recheck_s)
        return admission, residency

    def _blobs(self, settings: InferenceSettings) -> Blobs:
        """What reads pictures that are named by digest."""
        if settings.dataset is None:
            return NoBlobs()
        # Without a credential: each call shows the caller's own.
        channel = open_channel(settings.dataset, root_certificates_pem=_pem(settings.dataset_root_certificates_file))
        self._channels.append(channel)
        return Blobs(DatasetServiceStub(channel), settings.max_picture_bytes)

    def _begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        task.add_done_callback(_told)
        self._tasks.append(task)
        return task

    def _registry_changed(self) -> None:
        if self._registry is not None:
            self._metrics.followed(self._registry)
        if self._desired is not None:
            self._desired.wake()

    def _engine_now(self) -> tuple[EngineInfo, EngineStats] | None:
        try:
            engine = self._keeper.current.engine
        except Unavailable:
            return None
        return engine.info, engine.stats()

    def _serving(self, serving: bool) -> None:
        self._server.health.set_serving(SERVICE, serving)
        if self._desired is not None:
            self._desired.wake()

    async def _drain(self) -> None:
        if self._reporter is None:
            return
        try:
            await self._reporter.report(draining=True)
        except VeneerError as error:
            _log.warning("draining without the trainer's knowledge", reason=error.reason)


class _DrainingServer(Server):
    """Says that it drains before it does."""

    draining: Callable[[], Coroutine[Any, Any, None]]

    async def stop(self) -> None:
        """See Server."""
        self.health.stop()
        telling = asyncio.create_task(self.draining())
        await super().stop()
        await asyncio.wait({telling}, timeout=_TELL_S)
        telling.cancel()
        with suppress(asyncio.CancelledError):
            await telling


def _told(task: "asyncio.Task[None]") -> None:
    """Logs that something that runs for ever has ended by a defect."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("ended", work=task.get_coro().__qualname__, exc_info=error)  # type: ignore[union-attr]


def _authenticator(settings: InferenceSettings) -> DelegatingAuthenticator:
    key = _pem(settings.delegation_public_key_file)
    verifier = DelegationVerifier("inference", [key]) if key else None
    return DelegatingAuthenticator(TokenFile(settings.tokens_file), verifier)


def _pem(path: Path | None) -> bytes | None:
    return path.read_bytes() if path else None
