"""The trainer's process: settings in, parts wired (`assembly`), served until a signal."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from veneer_rpc import logs
from veneer_rpc.authentication import BearerAuthenticator
from veneer_rpc.errors import Unavailable
from veneer_rpc.parent import die_with_parent
from veneer_rpc.server import BindError, Server
from veneer_rpc.settings import SettingsError, load
from veneer_rpc.threads import in_thread
from veneer_rpc.tokens import TokenFile, TokenFileError
from veneer_trainer.adapters.metrics_page import metrics_page
from veneer_trainer.assembly import ROLES, SERVICES, assemble
from veneer_trainer.settings import TrainerSettings

_log = structlog.get_logger(__name__)
_THREADS = 32  # calls that may wait for the database, the disk or the dataset service at once


async def serve(settings: TrainerSettings) -> None:
    """Runs the trainer until SIGTERM or SIGINT.

    Raises:
        BindError: the address, or the port for metrics, cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(_THREADS, "work"))
    parts = assemble(settings, loop)  # nothing is served yet, so nothing is held up
    server = Server(settings, parts.servicers, BearerAuthenticator(TokenFile(settings.tokens_file)), ROLES)
    address = await server.start()
    rounds = [asyncio.create_task(_again(act, every_s)) for act, every_s in parts.rounds]
    for service in SERVICES:
        server.health.set_serving(service, True)
    print(f"veneer_trainer listening on {address}", flush=True)
    try:
        with metrics_page(parts.metrics, settings.metrics_port):
            await server.run()
    finally:
        for task in rounds:
            task.cancel()
        await asyncio.gather(*rounds, return_exceptions=True)
        await parts.close()


async def _again(act: Callable[[], None], every_s: float) -> None:
    """Does something now and then for ever; what fails is tried again the next time."""
    while True:
        try:
            await in_thread(act)
        except Unavailable as error:
            _log.warning("round postponed", reason=error.reason, problem=str(error.__cause__ or error))
        except Exception:
            _log.exception("round failed")
        await asyncio.sleep(every_s)


def main() -> int:
    """Runs the process; returns its exit code."""
    try:
        settings = load(TrainerSettings, "VENEER_TRAINER_", sys.argv[1:], os.environ)
        logs.configure(settings.log_level, settings.log_format)
        if settings.die_with_parent:
            die_with_parent()
        asyncio.run(serve(settings))
    except (SettingsError, TokenFileError, BindError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
