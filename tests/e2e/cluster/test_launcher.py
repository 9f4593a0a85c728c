"""The launcher's promises, with real processes and real signals."""

# ruff: noqa: ANN401  # the launcher's handle stays in conftest

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import psutil
import pytest

from veneer_client import cli
from veneer_cluster import tether


@pytest.fixture
def scripts(request: pytest.FixtureRequest) -> Any:
    """The programs of conftest, which no test module can import."""
    (conftest,) = (
        plugin for plugin in request.config.pluginmanager.get_plugins() if getattr(plugin, "STUBBORN", None) is not None
    )
    return conftest


def redis_set(address: str, *words: str) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address.removeprefix("unix:"))
        connection.sendall(" ".join(words).encode() + b"\r\n")
        return connection.recv(100).decode()


def test_processes_start_in_order_and_stop_without_a_rest(launch: Any, scripts: Any, gone: Any) -> None:
    launched = launch(service=scripts.SERVICE, worker=scripts.WORKER)
    launched.wait_ready()
    state = launched.state()
    assert [(process.name, process.state) for process in state.processes] == [
        ("valkey", "running"),
        ("service", "running"),
        ("worker", "running"),
    ]
    assert state.ready
    end_s = time.monotonic() + 10  # the first state may have met a process that had only just begun
    while not all(process.memory_bytes > 1_000_000 for process in launched.state().processes):
        assert time.monotonic() < end_s, launched.state()
        time.sleep(0.05)
    started = [psutil.Process(process.pid).create_time() for process in state.processes]
    assert started == sorted(started)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == (0, "")
    assert gone(*(process.pid for process in state.processes), within_s=0)
    assert "working" in launched.folder.log("worker").read_text()


def test_kill_9_of_the_launcher_leaves_no_orphan(launch: Any, scripts: Any, gone: Any) -> None:
    launched = launch(service=scripts.SERVICE, worker=scripts.WORKER)
    launched.wait_ready()
    pids = launched.pids()
    launched.process.kill()
    assert gone(*pids.values()), pids
    assert launched.folder.read_state() is None


def test_kill_9_while_a_process_starts_leaves_no_orphan(gone: Any) -> None:
    """A parent that dies before the child has asked the kernel for its tie."""
    parent = f"""
import os, subprocess, sys
late = "import time, os, sys; time.sleep(0.5); os.execv(sys.executable, sys.argv[1:])"
tether = ["-IS", {tether.__file__!r}, str(os.getpid()), "0"]
sleeper = [sys.executable, "-c", "import time; time.sleep(20)"]
command = [sys.executable, "-c", late, sys.executable, *tether, *sleeper]
child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    process = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL
    assert gone(int(process.stdout), within_s=5)


def test_a_process_that_dies_is_started_again(launch: Any, scripts: Any) -> None:
    launched = launch(service=scripts.SERVICE, worker=scripts.WORKER)
    launched.wait_ready()
    before = {process.name: process for process in launched.state().processes}
    assert redis_set(before["valkey"].address, "SET", "kept", "yes") == "+OK\r\n"
    os.kill(before["service"].pid, signal.SIGKILL)
    os.kill(before["valkey"].pid, signal.SIGKILL)
    end_s = time.monotonic() + 20
    while time.monotonic() < end_s:
        now = {process.name: process for process in launched.state().processes}
        if all((now[name].restarts, now[name].state) == (1, "running") for name in ("service", "valkey")):
            break
        time.sleep(0.1)
    assert now["service"].pid not in (0, before["service"].pid)
    assert now["service"].address == before["service"].address
    assert now["worker"].restarts == 0
    assert redis_set(now["valkey"].address, "GET", "kept") == "$3\r\nyes\r\n"
    launched.process.send_signal(signal.SIGTERM)
    status, said = launched.end()
    assert status == 0
    assert "service ended with status -9; it is started again in 0.5 s" in said
    assert f"service runs again, pid {now['service'].pid}" in said


def test_a_process_that_never_gets_ready_ends_all(launch: Any, scripts: Any, gone: Any) -> None:
    launched = launch(service=scripts.SERVICE, service_broken=scripts.BROKEN, worker=scripts.WORKER)
    status, said = launched.end()
    assert status == 1
    assert "service_broken ended with status 3 before it was ready. The end of its log:\nno such base" in said
    assert not [process for process in psutil.process_iter(["cmdline"]) if _names(process, launched.folder.root)]
    assert not launched.folder.log("worker").exists()


def test_what_does_not_end_is_killed_with_its_children(launch: Any, scripts: Any, gone: Any) -> None:
    launched = launch(worker=scripts.STUBBORN)
    launched.wait_ready()
    log, end_s = launched.folder.log("worker"), time.monotonic() + 10
    while "child" not in log.read_text():
        assert time.monotonic() < end_s
        time.sleep(0.05)
    pids = [launched.pids()["worker"], int(log.read_text().split()[1])]
    launched.process.send_signal(signal.SIGINT)
    started_s = time.monotonic()
    assert launched.end()[0] == 0
    assert 1 <= time.monotonic() - started_s < 10
    assert gone(*pids, within_s=2)


@pytest.fixture
def veneer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    names = {"up": "up", "status": "status", "logs": "logs", "down": "down", "tokens.create": "create_token"}
    entries = [EntryPoint(name, f"veneer_cluster.commands:{at}", cli.COMMANDS) for name, at in names.items()]
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["veneer", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


def test_status_logs_and_down(launch: Any, scripts: Any, gone: Any, veneer: Any) -> None:
    launched = launch(service=scripts.SERVICE, worker=scripts.WORKER)
    launched.wait_ready()
    directory = ("--dir", launched.folder.root)
    code, out, _ = veneer("status", *directory)
    assert code == 0
    columns = ["PROCESS", "PID", "ADDRESS", "MEMORY", "PEAK", "CORES", "RESTARTS", "STATE"]
    assert out.splitlines()[1].split() == columns
    assert out.splitlines()[2].split()[0] == "valkey"
    pids = [process["pid"] for process in json.loads(veneer("status", "--json", *directory)[1])["processes"]]
    code, out, _ = veneer("logs", "worker", *directory)
    assert (code, out) == (0, "working\n")
    assert "service  127.0.0.1" in veneer("logs", *directory)[1]
    assert json.loads(veneer("logs", "worker", "--json", *directory)[1]) == {"process": "worker", "line": "working"}
    assert veneer("logs", "painter", *directory)[0] == 2
    code, _, err = veneer("up", *directory)
    assert code == 1
    assert f"already (pid {launched.process.pid}). `veneer status` shows it, `veneer down` stops it" in err
    assert "already (pid" in veneer("up", "--detach", *directory)[2]
    code, out, _ = veneer("down", *directory)
    assert (code, out) == (0, f"the cluster in {launched.folder.root} has stopped\n")
    assert gone(*pids, within_s=0)
    code, _, err = veneer("status", *directory)
    assert code == 1
    assert err == f"veneer: no cluster runs in {launched.folder.root}. Start one with `veneer up`\n"
    assert veneer("down", *directory)[0] == 1
    assert veneer("logs", "worker", *directory)[1] == "working\n"


def test_status_fails_while_something_does_not_run(launch: Any, scripts: Any, veneer: Any) -> None:
    launched = launch(worker=scripts.WORKER)
    launched.wait_ready()
    os.kill(launched.pids()["worker"], signal.SIGKILL)
    codes = []
    end_s = time.monotonic() + 10
    while 1 not in codes and time.monotonic() < end_s:
        codes.append(veneer("status", "--dir", launched.folder.root)[0])
        time.sleep(0.05)
    assert 1 in codes


@pytest.mark.parametrize(
    ("place", "problem"),
    [("file", "a file is there"), ("file/below", "Not a directory"), ("shut", "Permission denied")],
)
def test_a_folder_that_cannot_be_used_is_told(
    veneer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, problem: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # for root may write anywhere
    told = f"veneer: {tmp_path / place} cannot be used as a cluster's folder: {problem}. Name one that you may write to"
    for command in (("up",), ("up", "--detach"), *([] if place == "shut" else [("status",), ("down",)])):
        code, _, err = veneer(*command, "--dir", tmp_path / place)
        assert (code, err[: len(told)]) == (1, told), command


def test_tokens_are_made_where_a_cluster_was(veneer: Any, tmp_path: Path) -> None:
    from veneer_cluster import credentials
    from veneer_cluster.folder import Folder

    assert veneer("tokens", "create", "--tenant", "acme", "--dir", tmp_path)[0] == 1
    folder = Folder(tmp_path)
    folder.create()
    credentials.ensure(folder)
    code, out, _ = veneer("tokens", "create", "--tenant", "acme", "--dir", tmp_path)
    assert code == 0
    assert out.startswith("vnr_")
    assert len(out.split()) == 1
    code, _, err = veneer("tokens", "create", "--tenant", "NOT ONE", "--dir", tmp_path)
    assert code == 1
    assert "tenant must be 1-63" in err


def _names(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in argument for argument in process.info["cmdline"] or ())
