"""How far the making of a version is, and how long it will take still."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from veneer_rpc.errors import Cancelled


class Phase(IntEnum):
    """What is being done."""

    READING_ROWS = 1
    CHECKING_PICTURES = 2
    COUNTING_TOKENS = 3
    WRITING = 4


@dataclass(frozen=True, slots=True)
class Position:
    """A phase and how much of it is done; `total` 0 and `remaining_s` None while unknown."""

    phase: Phase
    done: int = 0
    total: int = 0
    remaining_s: float | None = None


class Progress:
    """Told by the thread that makes a version, read by others."""

    def __init__(self) -> None:
        self.position = Position(Phase.READING_ROWS)
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the work at its next report."""
        self._cancelled.set()

    def entered(self, phase: Phase, total: int = 0) -> Callable[[int], None]:
        """Begins a phase and returns what to tell how much of it is done.

        The time that remains is that of this phase, at its speed so far. The returned function raises
        Cancelled when the work should end.
        """
        started_s = time.monotonic()

        def told(done: int) -> None:
            if self._cancelled.is_set():
                raise Cancelled("VERSION_CANCELLED", "nobody waits for the version any more")
            elapsed_s = time.monotonic() - started_s
            remaining_s = elapsed_s * (total - done) / done if done and total else None
            self.position = Position(phase, done, total, remaining_s)

        told(0)
        return told
