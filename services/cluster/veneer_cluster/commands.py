"""`veneer up`, `status`, `logs`, `down` and `tokens create`."""

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from veneer_client._address import CLUSTER_FILE, Cluster, default_directory, write
from veneer_client.commands import screen
from veneer_client.commands.options import Json
from veneer_cluster import base, credentials, fit, machine
from veneer_cluster.folder import ClusterError, ClusterState, Folder
from veneer_cluster.launcher import STOP_GRACE_S, Launcher
from veneer_cluster.programs import Plan, programs
from veneer_cluster.spawn import spawn, wait_ready

Directory = Annotated[
    Path | None, typer.Option("--dir", help="The cluster's folder. Default: VENEER_DIR, else the usual one.")
]
_COLOURS = {"running": "green", "starting": "cyan", "restarting": "yellow", "stopped": "red"}


def up(
    base_reference: Annotated[
        str | None, typer.Option("--base", help="Directory or hub id. Default: the demonstration base.")
    ] = None,
    directory: Directory = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that train.")] = 1,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that answer.")] = 1,
    redis: Annotated[str | None, typer.Option(help="URL of a running server, instead of an embedded one.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it runs; `veneer down` stops it.")] = False,
    json: Json = False,
) -> None:
    """Starts a cluster on this machine: queue, services, workers and replicas, on loopback with a token.

    Ctrl-C stops it. A process that dies is started again. Data stays in the folder for the next time.

    Example:
        veneer up --base Qwen/Qwen3-VL-2B-Instruct --detach
    """
    folder = Folder(directory or default_directory())
    folder.create()
    if detach:
        flags = ["--dir", folder.root, "--workers", workers, "--replicas", replicas]
        flags += ["--base", base_reference] if base_reference else []
        flags += ["--redis", redis] if redis else []
        _print_state(_start_detached(folder, [str(flag) for flag in flags]), json)
        return
    with folder.lock():
        found = base.find(base_reference)
        cpu = fit.Arithmetic(machine.has_bf16(), machine.has_avx2())
        room = fit.room(found, workers, replicas, cpu, machine.available_memory_bytes())
        plan = Plan(found, folder, workers, replicas, machine.cores(), redis, room)
        token = credentials.ensure(folder)
        _run(plan, token, json)


def status(json: Json = False, directory: Directory = None) -> None:
    """Shows the processes of the cluster on this machine; exits with 1 unless all of them run.

    Example:
        veneer status
    """
    folder = Folder(directory or default_directory())
    state = _running_state(folder)
    _print_state(state, json)
    if any(process.state != "running" for process in state.processes):
        raise typer.Exit(1)


def logs(
    process: Annotated[str | None, typer.Argument(help="Such as worker-1. Default: all.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Stay and print what comes.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Of each log, the last ones.")] = 40,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Prints the logs of the cluster's processes, also after it has ended.

    Example:
        veneer logs -f worker-1
    """
    folder = Folder(directory or default_directory())
    known = sorted(path.stem for path in folder.logs.glob("*.log"))
    if not known:
        raise ClusterError(f"{folder.root} holds no logs: no cluster ever ran there")
    if process is not None and process not in known:
        raise typer.BadParameter(f"{process} has no log; there are {', '.join(known)}")
    names = [process] if process else known
    width = max(map(len, names)) if len(names) > 1 else 0
    offsets = {}
    for name in names:
        text = folder.log(name).read_bytes()
        offsets[name] = len(text)
        for line in text.decode("utf-8", "replace").splitlines()[-lines:] if lines else []:
            _print_log_line(name, line, width, json)
    while follow:
        for name, line in _new_lines(folder, offsets):
            _print_log_line(name, line, width, json)
        time.sleep(0.2)


def down(json: Json = False, directory: Directory = None) -> None:
    """Stops the cluster on this machine. Its data stays.

    Example:
        veneer down
    """
    folder = Folder(directory or default_directory())
    pid = folder.runner()
    if not pid:
        raise ClusterError(f"no cluster runs in {folder.root}")
    os.kill(pid, signal.SIGTERM)
    end_s = time.monotonic() + 4 * STOP_GRACE_S  # as many stages may each take their grace
    while folder.runner() == pid:
        if time.monotonic() > end_s:
            raise ClusterError(f"the launcher (pid {pid}) has not ended: see {folder.log('launcher')}")
        time.sleep(0.05)
    if json:
        screen.print_json({"stopped": pid})
    else:
        print(f"the cluster in {folder.root} has stopped")


def create_token(
    tenant: Annotated[str, typer.Option(help="Whose data the token opens.")],
    role: Annotated[list[str] | None, typer.Option(help="What it may do; may be repeated. Default: user.")] = None,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Makes a token that this machine's cluster accepts at once, and prints it: it is stored nowhere.

    Example:
        veneer tokens create --tenant accounting
    """
    folder = Folder(directory or default_directory())
    if not folder.secrets.is_dir():
        raise ClusterError(f"{folder.root} is no cluster's folder: `veneer up` makes one")
    token = credentials.grant(folder, tenant, role or ("user",))
    if json:
        screen.print_json({"tenant": tenant, "token": token})
    else:
        print(token)


def _run(plan: Plan, token: str, json: bool) -> None:
    folder, started = plan.folder, programs(plan)
    addresses = {program.name: program.address for program in started}

    def announce(state: ClusterState) -> None:
        inference = tuple(address for name, address in addresses.items() if name.startswith("replica-"))
        write(Cluster(addresses["dataset"], addresses["trainer"], inference, token), folder.root)
        _print_state(state, json)

    async def run() -> None:
        launcher = Launcher(folder, started, f"models/{plan.base.model}", str(plan.base.directory))
        await launcher.run(announce)

    try:
        asyncio.run(run())
    finally:
        (folder.root / CLUSTER_FILE).unlink(missing_ok=True)


def _start_detached(folder: Folder, flags: list[str]) -> ClusterState:
    with folder.lock():  # before the log of a launcher that runs is begun anew
        pass
    return wait_ready(folder, spawn(folder, flags, tied=False))


def _running_state(folder: Folder) -> ClusterState:
    state = folder.read_state()
    if state is None:
        raise ClusterError(f"no cluster runs in {folder.root}. Start one with `veneer up`")
    return state


def _print_state(state: ClusterState, json: bool) -> None:
    if json:
        screen.print_json(dataclasses.asdict(state))
        return
    print(f"{state.model} from {state.base}")
    rows = [
        (
            process.name,
            str(process.pid or ""),
            process.address,
            screen.size(process.memory_bytes) if process.memory_bytes else "",
            screen.size(process.peak_memory_bytes) if process.peak_memory_bytes else "",
            str(process.cores),
            str(process.restarts or ""),
            Text(process.state, style=_COLOURS[process.state]),
        )
        for process in state.processes
    ]
    columns = ("PROCESS", ">PID", "ADDRESS", ">MEMORY", ">PEAK", ">CORES", ">RESTARTS", "STATE")
    screen.print_table(columns, rows, "no processes")
    total_bytes = sum(process.memory_bytes for process in state.processes)
    print(f"{screen.size(total_bytes)} in all, {screen.size(machine.available_memory_bytes())} free")


def _print_log_line(name: str, line: str, width: int, json: bool) -> None:
    if json:
        screen.print_json({"process": name, "line": line})
    else:
        print(f"{name:<{width}}  {line}" if width else line, flush=True)


def _new_lines(folder: Folder, offsets: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yields whole lines that were added to the logs, and moves the offsets behind them."""
    for name, offset in offsets.items():
        path = folder.log(name)
        if path.stat().st_size < offset:  # begun anew
            offset = offsets[name] = 0
        with path.open("rb") as file:
            file.seek(offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        offsets[name] = offset + len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            yield name, line
