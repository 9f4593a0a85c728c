"""The dataset service's process: `python -m veneer_dataset --help`. The only place where its parts are wired."""

import asyncio
import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import structlog
from obstore.store import from_url

from veneer.dataset.v1.dataset_service_pb2_grpc import add_DatasetServiceServicer_to_server
from veneer_dataset.adapters.folder_blobs import FolderBlobs
from veneer_dataset.adapters.models import TrainerModels
from veneer_dataset.adapters.object_blobs import ObjectBlobs
from veneer_dataset.adapters.packs import PackFolder
from veneer_dataset.adapters.partial_folder import PartialFolder
from veneer_dataset.adapters.pictures.cache import PixelCache
from veneer_dataset.adapters.pictures.checker import DecodingChecker
from veneer_dataset.adapters.pictures.pool import PicturePool
from veneer_dataset.adapters.pictures.resizer import CachingResizer
from veneer_dataset.adapters.sql.blobs import DEFAULT_FRESH_S, SqlBlobs
from veneer_dataset.adapters.sql.database import Database
from veneer_dataset.adapters.sql.datasets import SqlDatasets
from veneer_dataset.adapters.sql.facts import SqlFacts
from veneer_dataset.adapters.sql.requests import SqlRequests
from veneer_dataset.adapters.sql.versions import SqlVersions
from veneer_dataset.adapters.work_folder import emptied
from veneer_dataset.api import example_wire
from veneer_dataset.api.app import App
from veneer_dataset.api.servicer import DatasetServicer
from veneer_dataset.api.works import Works
from veneer_dataset.authentication import DelegatingAuthenticator
from veneer_dataset.domain.blobs import Blobs
from veneer_dataset.domain.examples import Examples
from veneer_dataset.domain.freezing import Freezer
from veneer_dataset.domain.packed import RowSources
from veneer_dataset.ports import BlobStore
from veneer_dataset.settings import DatasetSettings
from veneer_rpc import logs
from veneer_rpc.channel import open_channel
from veneer_rpc.delegation import DelegationVerifier
from veneer_rpc.paging import Paginator
from veneer_rpc.parent import die_with_parent
from veneer_rpc.server import BindError, Server
from veneer_rpc.settings import SettingsError, load
from veneer_rpc.threads import in_thread
from veneer_rpc.tokens import TokenFile, TokenFileError

SERVICE = "veneer.dataset.v1.DatasetService"
PREFIX = "VENEER_DATASET_"

_THREADS = 32
_PAGING_KEY_BYTES = 32
_FRESH_SHARE = 1 / 24  # of the grace, which notes of use may lag behind at most
_SWITCH_INTERVAL_S = 0.0005  # a thread that makes a version would else hold up each step of each call for 5 ms
_log = structlog.get_logger(__name__)


async def serve(settings: DatasetSettings) -> None:
    """Serves until a signal asks to stop."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "calls"))
    async with AsyncExitStack() as stack:
        data = settings.data
        data.mkdir(parents=True, exist_ok=True)
        database = Database(settings.database_url)
        stack.callback(database.close)
        partial_blobs = PartialFolder(data / "partial")
        fresh_s = min(DEFAULT_FRESH_S, settings.grace_of_blobs_s * _FRESH_SHARE)
        blobs = Blobs(_blob_store(settings), SqlBlobs(database, fresh_s), partial_blobs)
        pool = PicturePool(
            settings.decoders or os.cpu_count() or 1,
            settings.picture_memory_bytes,
            settings.picture_cpu_s,
            settings.picture_wall_s,
        )
        stack.callback(pool.close)
        versions, facts = SqlVersions(database), SqlFacts(database)
        freezer = Freezer(
            blobs,
            versions,
            lambda tenant: DecodingChecker(tenant, blobs, facts, pool),
            emptied(data / "work"),
        )
        works = Works(freezer, settings.versions_at_once, settings.max_versions_waiting)
        stack.callback(works.stop)
        resizer = CachingResizer(blobs, pool, PixelCache(data / "pixels", settings.pixel_cache_bytes))
        packs = PackFolder(data / "packs", settings.pack_cache_bytes)
        sources = RowSources(versions, blobs, packs, example_wire)
        key = database.secret("pages", _PAGING_KEY_BYTES)
        app = App(
            datasets=SqlDatasets(database),
            versions=versions,
            blobs=blobs,
            partial=partial_blobs,
            examples=Examples(versions, blobs, resizer, sources),
            works=works,
            models=await _models(settings, stack),
            requests=SqlRequests(database),
            pages=Paginator(key),
            finding_pages=Paginator(key, default_size=100),
            quota_bytes=settings.quota_bytes,
            stall_s=settings.upload_stall_s,
        )
        register = partial(add_DatasetServiceServicer_to_server, DatasetServicer(app))
        server = Server(
            settings,
            [register],
            _authenticator(settings),
            {f"{SERVICE}/{method}": ("user", "service") for method in ("PlaceHold", "ReleaseHold")},
        )
        address = await server.start()
        collecting = asyncio.create_task(_collect(settings, blobs, partial_blobs, sources))
        stack.push_async_callback(_ended, collecting)
        gc.collect()
        gc.freeze()  # what was made by now stays: looking through it again and again is a twentieth of a reader's time
        server.health.set_serving(SERVICE, True)
        print(f"veneer_dataset listening on {address}", flush=True)
        await server.run()


def main() -> int:
    """Reads the settings and serves; returns the exit status."""
    try:
        settings = load(DatasetSettings, PREFIX, sys.argv[1:], os.environ)
        if settings.die_with_parent:
            die_with_parent()
        logs.configure(settings.log_level, settings.log_format)
        asyncio.run(serve(settings))
    except (SettingsError, TokenFileError, BindError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _blob_store(settings: DatasetSettings) -> BlobStore:
    if settings.blobs is None:
        return FolderBlobs(settings.data / "blobs")
    return ObjectBlobs(from_url(settings.blobs))


async def _models(settings: DatasetSettings, stack: AsyncExitStack) -> TrainerModels:
    folder = settings.data / "models"
    folder.mkdir(exist_ok=True)
    if settings.trainer is None or settings.trainer_token_file is None:
        return TrainerModels(None, folder)
    certificates = settings.trainer_root_certificates_file
    channel = open_channel(
        settings.trainer,
        _read(settings.trainer_token_file).decode().strip(),
        root_certificates_pem=_read(certificates) if certificates else None,
    )
    stack.push_async_callback(channel.close)
    return TrainerModels(channel, folder)


def _authenticator(settings: DatasetSettings) -> DelegatingAuthenticator:
    key = settings.delegation_public_key_file
    verifier = DelegationVerifier("dataset", [_read(key)]) if key else None
    return DelegatingAuthenticator(TokenFile(settings.tokens_file), verifier)


def _read(path: Path) -> bytes:
    return path.read_bytes()


async def _collect(settings: DatasetSettings, blobs: Blobs, partial_blobs: PartialFolder, sources: RowSources) -> None:
    """Collects what nobody names, again and again; a failure is logged and the next round tries anew."""
    while True:
        await asyncio.sleep(settings.collect_every_s)
        try:
            count = await in_thread(blobs.collect, settings.grace_of_blobs_s)
            await in_thread(partial_blobs.remove_older_than, settings.grace_of_blobs_s)
            await in_thread(sources.collect)
            _log.info("collected", blobs=count)
        except Exception:
            _log.exception("collecting failed")


async def _ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    sys.exit(main())
