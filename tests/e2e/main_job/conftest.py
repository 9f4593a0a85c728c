"""A whole cluster as `veneer up` starts it, on the demonstration base, and a few handwritten digits to learn."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from veneer_client import Client
from veneer_cluster.demo.scenes import HANDWRITING, digits, write
from veneer_cluster.folder import ClusterState, Folder, ProcessState

ROWS = {"train": 64, "validation": 16, "test": 24}


def veneer(*words: object, directory: Path, status: int = 0, **variables: str) -> str:
    """Runs the command line as a person does, and returns what it printed."""
    command = [sys.executable, "-m", "veneer_client", *map(str, words)]
    environment = {**os.environ, "VENEER_DIR": str(directory), "NO_COLOR": "1", "COLUMNS": "160"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@dataclass
class Cluster:
    """A cluster that runs, its folder, and a client of its own tenant."""

    folder: Folder
    client: Client

    def state(self) -> ClusterState:
        state = self.folder.read_state()
        assert state is not None
        return state

    def process(self, name: str) -> ProcessState:
        return next(process for process in self.state().processes if process.name == name)

    def veneer(self, *words: object, status: int = 0, **variables: str) -> str:
        return veneer(*words, directory=self.folder.root, status=status, **variables)

    def kill(self, name: str) -> None:
        """kill -9 of one process; returns once the launcher has started it again."""
        before = self.process(name).pid
        os.kill(before, signal.SIGKILL)
        self.until(lambda: self.process(name).pid not in (0, before) and self.process(name).state == "running")

    def kill_child(self, name: str) -> None:
        """kill -9 of what a process started."""
        for child in psutil.Process(self.process(name).pid).children(recursive=True):
            child.kill()

    def until(self, holds: Callable[[], Any], within_s: float = 100) -> None:
        """Waits for something to come true."""
        end_s = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < end_s, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        """The end of each log: what a failed test shows."""
        tails = {path.stem: path.read_text("utf-8", "replace")[-2000:] for path in self.folder.logs.glob("*.log")}
        return "\n".join(f"=== {name}\n{tail}" for name, tail in sorted(tails.items()))


@contextmanager
def running(*flags: object, **variables: str) -> Iterator[Cluster]:
    """A cluster of its own, its services' settings in variables; what it leaves is removed.

    Its workers measure nothing while they are idle, which takes processors from the tests.
    """
    root = Path(tempfile.mkdtemp(prefix="veneer-e2e-"))
    variables = {"VENEER_WORKER_CALIBRATE_IDLE_S": "3600"} | variables
    try:
        veneer("up", "--detach", *flags, directory=root, **variables)
        folder = Folder(root)
        pids = [process.pid for process in folder.read_state().processes]  # type: ignore[union-attr]
        with Client(directory=root) as client:
            yield Cluster(folder, client)
        state = folder.read_state()
        pids += [process.pid for process in state.processes] if state else []
        veneer("down", directory=root)
        assert not [pid for pid in pids if psutil.pid_exists(pid)], "the cluster left processes behind"
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def served(export: Path) -> Iterator[Client]:
    """A client of `veneer serve EXPORT_DIR`, which stands alone."""
    command = [sys.executable, "-m", "veneer_client", "serve", str(export), "--bind", "127.0.0.1:0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            told = json.loads(process.stdout.readline())
            with Client(inference=[told["address"]], token=told["token"]) as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
    assert process.returncode == 0


@pytest.fixture(scope="session")
def serve() -> Callable[[Path], AbstractContextManager[Client]]:
    """`served`, for modules that cannot import this one."""
    return served


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster for a module; an export is checked on few prompts."""
    with running(VENEER_WORKER_EXPORT_PROMPTS="4") as made:
        yield made


@pytest.fixture
def learned() -> Iterator[Cluster]:
    """A cluster whose exports are checked on as many prompts as usually."""
    with running() as made:
        yield made


@pytest.fixture
def pair() -> Iterator[Cluster]:
    """A cluster whose inference service has two replicas."""
    with running("--replicas", 2) as made:
        yield made


@pytest.fixture(scope="session")
def rows() -> dict[str, list[tuple[Any, str, str]]]:
    """A few digits of each split."""
    return {split: found[: ROWS[split]] for split, found in digits().items()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list[tuple[Any, str, str]]]) -> Path:
    """A folder to push."""
    root = tmp_path_factory.mktemp("rows") / "digits"
    write(replace(HANDWRITING, rows=lambda: rows), root)
    return root
