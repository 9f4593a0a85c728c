"""The ranks of one training process, started and watched by torchrun's agent on this machine.

    worker ── its child, the agent here ── rank 0, rank 1, …

Each rank has a socket of its own to the worker, as an only child has: it hears its task there, says what is wrong with
it, and ends when the worker does. Rank 0 tells all the rest. A rank that ends takes the others along; the agent starts
none again, for that is what the lease is for.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import structlog
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from veneer_rpc.parent import die_with_parent
from veneer_trainer.worker.loop.group import train_together
from veneer_trainer.worker.loop.link import Link
from veneer_trainer.worker.loop.ranks import Ranks
from veneer_trainer.worker.messages import Task

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_END_S = 5  # for the others once one has ended; then they are killed
_log = structlog.get_logger(__name__)


def run_ranks(connections: Sequence[socket.socket], folder: Path, device: str) -> NoReturn:
    """Has a rank run for each connection, and ends this process with the first of them that ends.

    Args:
        connections: to the worker, rank 0's first.
        folder: the attempt's own; ranks meet there.
        device: "cpu", or "cuda": one for each rank.
    """
    # They speak to one another over loopback alone, and meet in files: torchrun's own store would listen everywhere.
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", _LOOPBACK)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(connections),
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder / "agents"),
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=0,
        # A fork begins at once; but one of a process that has asked for its GPUs cannot use them.
        start_method="fork" if device == "cpu" else "spawn",
        virtual_local_rank=True,  # each sees one GPU
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=_END_S,
    )
    status = 1
    try:
        elastic_launch(config, _rank)(connections, folder / "ranks")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _log.error("rank ended", rank=rank, status=failure.exitcode)
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # as a shell says it
    os._exit(status)


def _rank(connections: Sequence[socket.socket], meeting: Path) -> None:
    """A rank's process: it trains until the worker or the agent ends it."""
    # The agent's own handlers came along, and would wait for the end of a product.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    rank = int(os.environ["RANK"])
    link = Link(connections[rank], leads=rank == 0)
    if not isinstance(link.task, Task):
        raise TypeError(f"ranks train, they do not {type(link.task).__name__}")
    train_together(link, Ranks.joined(meeting, link.task.device, link.task.dataset_patience_s))
