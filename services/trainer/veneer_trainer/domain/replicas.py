"""The replicas that serve adapters, as they last said of themselves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from veneer_rpc.errors import Violations

_MAX_NAME = 63
_MAX_ADDRESS = 255


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica; `held` has (tenant, version, digest) of what it holds."""

    name: str
    address: str
    model: str
    draining: bool
    revision: int
    held: tuple[tuple[str, str, str], ...] = ()

    def check(self, found: Violations) -> None:
        """Notes fields that are missing or too long."""
        for field, text, most in (("replica", self.name, _MAX_NAME), ("address", self.address, _MAX_ADDRESS)):
            if not 1 <= len(text) <= most:
                found.add(field, "OUT_OF_RANGE", f"must be 1-{most} characters, were {len(text)}")


class Replicas:
    """The replicas that have reported lately.

    Args:
        memory_s: how long one is remembered after its last report.
        clock: monotonic seconds.
    """

    def __init__(self, memory_s: float = 120.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory_s = memory_s
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[Replica, float]] = {}

    def report(self, replica: Replica) -> None:
        """Notes a report in the place of the one before."""
        with self._lock:
            self._seen[replica.name] = (replica, self._clock())

    def known(self) -> tuple[Replica, ...]:
        """Returns the replicas, by name."""
        oldest_s = self._clock() - self._memory_s
        with self._lock:
            self._seen = {name: seen for name, seen in self._seen.items() if seen[1] >= oldest_s}
            return tuple(replica for _, (replica, _) in sorted(self._seen.items()))
