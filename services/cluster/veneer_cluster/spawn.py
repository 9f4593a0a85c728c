"""The launcher in a process of its own: started in the background, and awaited."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from veneer_cluster import tether
from veneer_cluster.folder import ClusterError, ClusterState, Folder
from veneer_cluster.launcher import START_TIMEOUT_S


def spawn(folder: Folder, flags: Sequence[str], *, tied: bool) -> "subprocess.Popen[bytes]":
    """Starts `veneer up` in a folder; its output goes to the log `launcher`.

    Args:
        folder: the cluster's.
        flags: of `veneer up`, without `--dir`.
        tied: it ends with this process, however that came about.
    """
    command = [sys.executable, "-m", "veneer_cluster", "--dir", str(folder.root), *flags]
    if tied:
        command = [sys.executable, "-IS", tether.__file__, str(os.getpid()), "0", *command]
    with folder.log("launcher").open("wb") as log:
        return subprocess.Popen(  # noqa: S603  # our own program
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def wait_ready(folder: Folder, process: "subprocess.Popen[bytes]") -> ClusterState:
    """Waits until the cluster serves.

    Raises:
        ClusterError: the launcher ended, or took too long; the text holds why.
    """
    end_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise ClusterError(folder.log("launcher").read_text("utf-8").strip().removeprefix("veneer: "))
        state = folder.read_state()
        if state is not None and state.ready:
            return state
        time.sleep(0.1)
    raise ClusterError(
        f"the cluster is not ready after {START_TIMEOUT_S:g} s: see {folder.logs}; `veneer down` stops it"
    )
