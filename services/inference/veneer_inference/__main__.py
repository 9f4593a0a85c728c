"""The inference service's process: `python -m veneer_inference --help`. Settings in, served until a signal."""

import asyncio
import os
import sys
from collections.abc import Callable

from veneer_inference.engine.client import EngineProcess
from veneer_inference.ports import Engine, EngineError
from veneer_inference.replica import Replica
from veneer_inference.settings import InferenceSettings
from veneer_processing import ProcessingError
from veneer_rpc import logs
from veneer_rpc.parent import die_with_parent
from veneer_rpc.server import BindError
from veneer_rpc.settings import SettingsError, load
from veneer_rpc.tokens import TokenFileError

PREFIX = "VENEER_INFERENCE_"


def listening(address: str) -> None:
    """Prints that calls are answered from now on."""
    print(f"veneer_inference listening on {address}", flush=True)


async def serve(settings: InferenceSettings, announce: Callable[[str], None] = listening) -> None:
    """Serves until a signal asks to stop.

    Args:
        settings: validated.
        announce: is told the address once calls are answered.
    """

    async def start_engine() -> Engine:
        if settings.engine == "vllm":
            from veneer_inference.engine.vllm_engine import VllmEngine  # torch comes with it

            return await VllmEngine.start(
                settings.model_directory,
                dtype=settings.dtype,
                slots=settings.adapter_slots,
                max_rank=settings.max_rank,
                max_requests=settings.max_waiting,
            )
        return await EngineProcess.start(
            settings.model_directory,
            settings.threads or os.cpu_count() or 1,
            dtype=settings.dtype,
            as_stored=settings.as_stored,
            kv_tokens=settings.kv_tokens,
            step_tokens=settings.step_tokens,
            prefix_cache=settings.prefix_cache,
            speculation=settings.speculation,
            slots=settings.adapter_slots,
            max_rank=settings.max_rank,
            waiting=settings.max_waiting,
            adapter_bytes=settings.adapter_memory_bytes,
        )

    replica = Replica(settings, start_engine)
    try:
        address = await replica.start()
        announce(address)
        await replica.run()
    finally:
        await replica.close()


def main() -> int:
    """Reads the settings and serves; returns the exit status."""
    try:
        settings = load(InferenceSettings, PREFIX, sys.argv[1:], os.environ)
        if settings.die_with_parent:
            die_with_parent()
        logs.configure(settings.log_level, settings.log_format)
        asyncio.run(serve(settings))
    except (SettingsError, TokenFileError, BindError, EngineError, ProcessingError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
