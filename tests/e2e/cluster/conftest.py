"""A cluster of the real launcher and the real Valkey, with small programs in the place of the services."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from veneer_cluster.folder import ClusterState, Folder

SERVICE = """
import asyncio, sys, grpc
from grpc_health.v1 import health, health_pb2_grpc
async def main():
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    server.add_insecure_port(sys.argv[1])
    await server.start()
    print(sys.argv[1], "serves", flush=True)
    await server.wait_for_termination()
asyncio.run(main())
"""
WORKER = "import time; print('working', flush=True); time.sleep(600)"
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print("child", child.pid, flush=True)
time.sleep(600)
"""
BROKEN = "import sys; print('no such base: /models/none', flush=True); sys.exit(3)"
LAUNCH = """
import asyncio, json, sys
from pathlib import Path
from veneer_client import VeneerError
from veneer_cluster.folder import Folder
from veneer_cluster.launcher import Launcher
from veneer_cluster.programs import Plan, Probe, Program, _valkey, free_ports
folder, scripts = Folder(Path(sys.argv[1])), json.loads(sys.argv[2])
folder.create()
programs = [_valkey(folder)]
for stage, (name, script) in enumerate(scripts.items(), 1):
    serves = name.startswith(("service", "replica"))
    address = f"127.0.0.1:{free_ports(1)[0]}" if serves else ""
    probe = Probe.HEALTH if serves else Probe.ALIVE
    programs.append(Program(name, (sys.executable, "-c", script, address), stage, address, probe))
try:
    with folder.lock():
        launcher = Launcher(folder, programs, "models/tiny", "/models/tiny", grace_s=1.0)
        asyncio.run(launcher.run(lambda state: print("ready", flush=True)))
except VeneerError as error:
    sys.exit(f"veneer: {error}")
"""


@dataclass
class Launched:
    """A launcher, and the folder it runs in."""

    process: subprocess.Popen[str]
    folder: Folder

    def state(self) -> ClusterState:
        state = self.folder.read_state()
        assert state is not None
        return state

    def pids(self) -> dict[str, int]:
        return {process.name: process.pid for process in self.state().processes}

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.process.communicate()[1]

    def end(self) -> tuple[int, str]:
        """Waits for the end of the launcher; returns its status and what it said of errors."""
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts a launcher with programs by name; whatever is left of it afterwards is killed."""
    launched: list[Launched] = []

    def start(**scripts: str) -> Launched:
        command = [sys.executable, "-c", LAUNCH, str(tmp_path / "cluster"), json.dumps(scripts)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        launched.append(Launched(process, Folder(tmp_path / "cluster")))
        return launched[-1]

    yield start
    for each in launched:
        pids = each.pids().values() if each.folder.read_state() else []
        each.process.kill()
        each.process.communicate()
        for pid in filter(None, pids):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def gone() -> Callable[..., bool]:
    """Waits until none of some processes is left."""

    def wait(*pids: int, within_s: float = 10.0) -> bool:
        end_s = time.monotonic() + within_s
        while any(map(alive, pids)):
            if time.monotonic() > end_s:
                return False
            time.sleep(0.05)
        return True

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return wait
