"""The folder of a cluster: where its files lie, who runs it, and what it last said of itself."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from veneer_client import VeneerError

_LOCK_ATTEMPTS = 5
_LOCK_WAIT_S = 0.02


class ClusterError(VeneerError):
    """A cluster cannot be started, found or stopped; the text says what to do."""


@dataclass(frozen=True)
class ProcessState:
    """What is known of a process.

    Attributes:
        name: such as `replica-1`.
        pid: 0 while it does not run.
        address: where it listens; empty where it does not.
        state: `starting`, `running`, `restarting` or `stopped`.
        restarts: how often it was started again.
        cores: threads that it computes with.
        memory_bytes: resident, its children's too.
        peak_memory_bytes: the most of that so far.
        cpu_s: time on cores since its last start, its present and its ended children's too.
    """

    name: str
    pid: int
    address: str
    state: str
    restarts: int
    cores: int
    memory_bytes: int
    peak_memory_bytes: int
    cpu_s: float


@dataclass(frozen=True)
class ClusterState:
    """What the launcher last said: its pid, the base, and its processes. `ready` once all of them serve."""

    pid: int
    model: str
    base: str
    ready: bool
    processes: list[ProcessState] = field(default_factory=list)


class Folder:
    """A cluster's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def logs(self) -> Path:
        """Where each process's log lies, `NAME.log`."""
        return self.root / "logs"

    @property
    def secrets(self) -> Path:
        """Where tokens and keys lie."""
        return self.root / "secrets"

    def create(self) -> None:
        """Makes the folders that are missing, readable by their owner alone.

        Raises:
            ClusterError: one of them cannot be made, or written to.
        """
        for path in (self.root, self.logs, self.secrets):
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise self._unusable(error) from error
            if not os.access(path, os.W_OK | os.X_OK):
                raise self._unusable(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))

    def log(self, name: str) -> Path:
        """The log of a process."""
        return self.logs / f"{name}.log"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for one launcher; the kernel lets go however the process ends.

        Raises:
            ClusterError: another launcher holds it.
        """
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _locked(descriptor):
                raise ClusterError(
                    f"a cluster runs in {self.root} already (pid {_pid(descriptor)}). `veneer status` "
                    "shows it, `veneer down` stops it, --dir starts another one elsewhere"
                )
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            os.close(descriptor)

    def runner(self) -> int | None:
        """The pid of the launcher that holds the folder; None where none does.

        Raises:
            ClusterError: that cannot be told, since it is no folder or another user's.
        """
        try:
            descriptor = os.open(self.root / "lock", os.O_RDWR)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        try:
            return None if _locked(descriptor) else _pid(descriptor)
        finally:
            os.close(descriptor)

    def write_state(self, state: ClusterState) -> None:
        """Replaces what the launcher says of itself."""
        new = self.root / ".state.json.new"
        new.write_text(json.dumps(asdict(state)), "utf-8")
        new.replace(self.root / "state.json")

    def read_state(self) -> ClusterState | None:
        """What the launcher that holds the folder said last; None where none runs or none has spoken yet."""
        pid = self.runner()
        try:
            document = json.loads((self.root / "state.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        if pid is None or document["pid"] != pid:
            return None
        processes = [ProcessState(**each) for each in document.pop("processes")]
        return ClusterState(**document, processes=processes)

    def _unusable(self, error: OSError) -> ClusterError:
        problem = "a file is there" if self.root.is_file() else error.strerror
        return ClusterError(
            f"{self.root} cannot be used as a cluster's folder: {problem}. Name one that you may write to, "
            "or that can be made, with --dir or VENEER_DIR"
        )


def _locked(descriptor: int) -> bool:
    """Takes the lock; tries for a moment, since `runner` takes it for an instant too."""
    for _ in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_LOCK_WAIT_S)
    return False


def _pid(descriptor: int) -> int:
    return int(os.pread(descriptor, 32, 0) or b"0")
