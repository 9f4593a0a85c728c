"""A cluster of the demonstration's own: started in a folder, tied to this process, and stopped again."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from veneer_client import Client
from veneer_cluster.folder import Folder
from veneer_cluster.spawn import spawn, wait_ready

_STOP_TIMEOUT_S = 150.0


@contextmanager
def local_cluster(root: Path, flags: Sequence[str] = ()) -> Iterator[tuple[Client, Folder]]:
    """Runs `veneer up` in a folder while the block runs; it ends with this process, however that came about.

    Raises:
        ClusterError: it did not start; the text holds why.
    """
    folder = Folder(root)
    folder.create()
    process = spawn(folder, flags, tied=True)
    try:
        wait_ready(folder, process)
        with Client(directory=folder.root) as client:
            yield client, folder
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its processes are tied to it
            process.wait()
