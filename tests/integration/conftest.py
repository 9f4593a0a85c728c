"""Services' processes, each forked from one that has imported their modules: a start costs a tenth of a second."""

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

Start = Callable[..., "Process"]

OF_CHILDREN = {
    "veneer_inference": "veneer_inference.engine.process",
    "veneer_trainer.worker": "veneer_trainer.worker.child",
}


class Process:
    """A process that runs a module, with as much of `subprocess.Popen` as tests need."""

    def __init__(self, pid: int, stdout: IO[str], ends: int) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._ends = ends

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._ends], [], [], 0)[0]:
            self._read()
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ends], [], [], timeout_s)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout_s or 0)
            self._read()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read(self) -> None:
        with open(self._ends, "rb") as ends:
            self.returncode = int(ends.read())


class Forks:
    """The process that those of one module are forked from."""

    def __init__(self, module: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = Path(__file__).with_name("warm_program.py")
        with theirs:
            command = [sys.executable, str(program), str(theirs.fileno()), module]
            if module in OF_CHILDREN:
                command.append(OF_CHILDREN[module])
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def start(self, arguments: list[str], log: IO[str], **variables: str) -> Process:
        out, theirs = os.pipe()
        ends, their_ends = os.pipe()
        message = json.dumps({"arguments": arguments, "environment": os.environ | variables}).encode()
        fds = array.array("i", [theirs, log.fileno(), their_ends])
        self._control.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        os.close(theirs)
        os.close(their_ends)
        return Process(int(self._control.recv(64)), open(out), ends)

    def close(self) -> None:
        self._control.close()
        self._process.wait(10)


@pytest.fixture(scope="session")
def start_process() -> Iterator[Start]:
    """Starts a module with a command line, a file for its errors, and environment variables beside the test's own."""
    forks: dict[str, Forks] = {}

    def start(module: str, arguments: list[str], log: IO[str], **variables: str) -> Process:
        if module not in forks:
            forks[module] = Forks(module)
        return forks[module].start(arguments, log, **variables)

    yield start
    for each in forks.values():
        each.close()
