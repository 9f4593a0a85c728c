"""The worker's process: settings in, bases hashed, at work until a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from veneer_digests import DigestError
from veneer_rpc import logs
from veneer_rpc.parent import die_with_parent
from veneer_rpc.server import BindError
from veneer_rpc.settings import SettingsError, load
from veneer_rpc.threads import in_thread
from veneer_trainer.adapters.metrics_page import metrics_page
from veneer_trainer.worker.device import DeviceError, find
from veneer_trainer.worker.keeper import Keeper
from veneer_trainer.worker.machine import held_models
from veneer_trainer.worker.settings import WorkerSettings


async def work(settings: WorkerSettings) -> None:
    """Runs the worker until SIGTERM or SIGINT; work under way is given back with a checkpoint.

    Raises:
        DigestError, OSError: a base cannot be read.
        DeviceError: the device that was asked for is not there.
        BindError: the port for metrics cannot be listened on.
    """
    device = await in_thread(find, settings.device, settings.threads, settings.ranks)
    keeper = Keeper(settings, await in_thread(held_models, settings.model_directories), device)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, keeper.drain)
    with metrics_page(keeper.monitoring.registry, settings.metrics_port):
        await keeper.run()


def main() -> int:
    """Runs the process; returns its exit code."""
    try:
        settings = load(WorkerSettings, "VENEER_WORKER_", sys.argv[1:], os.environ)
        logs.configure(settings.log_level, settings.log_format)
        if settings.die_with_parent:
            die_with_parent()
        asyncio.run(work(settings))
    except (SettingsError, DigestError, DeviceError, BindError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
