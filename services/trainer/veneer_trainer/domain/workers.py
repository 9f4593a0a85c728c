"""What workers are and can do, as they last said when they asked for work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from veneer_trainer.domain.fair_share import Lane

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class StepCost:
    """A cost that is linear in a step's tokens, and in the pairs of tokens that attend to one another."""

    fixed: float
    per_text_token: float
    per_visual_token: float
    per_supervised_token: float
    per_token_pair: float = 0.0

    def of(self, text: float, visual: float, supervised: float, pairs: float) -> float:
        """Returns the cost of a step with so many tokens.

        Supervised tokens are among the text tokens; a row of n tokens has n squared pairs.
        """
        return (
            self.fixed
            + self.per_text_token * text
            + self.per_visual_token * visual
            + self.per_supervised_token * supervised
            + self.per_token_pair * pairs
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """What training one shape of job costs on a worker class: seconds of a step, bytes at its peak.

    Beside its steps a job costs the frozen tower's time, once for each picture, and memory for what is kept of rows and
    pictures, up to a limit. Loading its base and its first step take so much memory at least.
    """

    model_digest: str
    dtype: str
    target_modules: tuple[str, ...]
    rank: int
    seconds: StepCost
    memory_bytes: StepCost
    tower_seconds_per_visual_token: float = 0.0
    kept_bytes_per_visual_token: float = 0.0
    kept_bytes_limit: int = 0
    least_memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker; `models` is digest by name, and `ranks` processes share the rows of a step."""

    name: str
    device: str
    worker_class: str
    dtypes: frozenset[str]
    memory_bytes: int
    models: dict[str, str]
    calibrations: tuple[Calibration, ...] = ()
    code_version: str = ""
    ranks: int = 1

    def can_run(self, lane: Lane) -> bool:
        """Says whether the worker has what a lane's work needs."""
        return (
            (not lane.model_digest or lane.model_digest in self.models.values())
            and (not lane.dtype or lane.dtype in self.dtypes)
            and lane.memory_gib * _GIB <= self.memory_bytes + _GIB - 1
        )


class Workers:
    """The workers that have asked for work lately.

    Args:
        memory_s: how long one is remembered after it was last heard of.
        clock: monotonic seconds.
    """

    def __init__(self, memory_s: float = 3600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory_s = memory_s
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[Worker, float]] = {}

    def announce(self, worker: Worker) -> None:
        """Notes what a worker says of itself."""
        with self._lock:
            self._seen[worker.name] = (worker, self._clock())

    def known(self) -> tuple[Worker, ...]:
        """Returns the workers, by name."""
        oldest_s = self._clock() - self._memory_s
        with self._lock:
            self._seen = {name: seen for name, seen in self._seen.items() if seen[1] >= oldest_s}
            return tuple(worker for _, (worker, _) in sorted(self._seen.items()))

    def code_version(self, name: str) -> str:
        """Returns the version of Veneer's code that a worker runs; empty for one that is not known."""
        return next((worker.code_version for worker in self.known() if worker.name == name), "")
