"""One process of a cluster: started tied to this one, awaited, and stopped."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # generated

from veneer_cluster import machine, tether
from veneer_cluster.folder import ProcessState
from veneer_cluster.programs import Probe, Program

PROBE_INTERVAL_S = 0.1
_PROBE_TIMEOUT_S = 2.0
_KEPT_LOG_BYTES = 16_000_000


class Child:
    """A process that runs a program. Its output goes to a log."""

    def __init__(self, program: Program, log: Path) -> None:
        self.program = program
        self.log = log
        self.state = "starting"
        self.restarts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._peak_memory_bytes = 0

    @property
    def pid(self) -> int:
        """The process's id; 0 while none runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    async def start(self) -> None:
        """Starts the program. Call it in the main thread: the tie is to the starting thread (prctl(2))."""
        if self.log.exists() and self.log.stat().st_size > _KEPT_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        command = [sys.executable, "-IS", tether.__file__, str(os.getpid()), str(self.program.nice)]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                *self.program.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.program.environment},
                start_new_session=True,  # Ctrl-C is the launcher's to hear
            )

    async def wait_ready(self) -> bool:
        """Waits until the program is ready; False when it ended before."""
        while self.pid:
            if await self._is_ready():
                self.state = "running"
                return True
            await asyncio.sleep(PROBE_INTERVAL_S)
        return False

    async def wait(self) -> int:
        """Waits for the end of the process and returns its exit status, negative for a signal."""
        assert self._process is not None  # noqa: S101  # it was started
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """Asks the process to end; what is left of it and its children after the grace is killed."""
        pid = self.pid
        if pid:
            os.kill(pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    await self.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                await self.wait()
        self.state = "stopped"

    def last_lines(self, count: int) -> str:
        """The end of the log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 16_384))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-count:])

    def snapshot(self) -> ProcessState:
        """What is known of the process now."""
        pid = self.pid
        used = machine.memory_bytes(pid) if pid else 0
        self._peak_memory_bytes = max(self._peak_memory_bytes, used)
        program = self.program
        return ProcessState(
            program.name,
            pid,
            program.address,
            self.state,
            self.restarts,
            program.cores,
            used,
            self._peak_memory_bytes,
            machine.cpu_s(pid) if pid else 0.0,
        )

    async def _is_ready(self) -> bool:
        if self.program.probe is Probe.HEALTH:
            return await _serves(self.program.address)
        if self.program.probe is Probe.PING:
            return await _answers_ping(self.program.address)
        return True


async def _serves(address: str) -> bool:
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            response = await check(health_pb2.HealthCheckRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def _answers_ping(address: str) -> bool:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
            try:
                writer.write(b"PING\r\n")
                return (await reader.readline()).startswith(b"+PONG")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
