"""What Prometheus reads of a worker: what it does, how attempts ended, and the figures of the present one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge

from veneer.trainer.v1 import training_job_pb2

_FIGURES = {
    "step": "Optimiser steps done of the present job.",
    "loss": "Mean loss per supervised token, in nats.",
    "tokens_per_second": "Tokens of all kinds.",
    "rows_per_second": "Rows.",
    "peak_memory_bytes": "Peak resident memory of the training process.",
}


class Monitoring:
    """The figures of one worker.

    Args:
        progress: the latest figures of training; None where there are none.
    """

    def __init__(self, progress: Callable[[], training_job_pb2.TrainingProgress | None]) -> None:
        self.registry = CollectorRegistry()
        self._busy = Gauge(
            "veneer_worker_busy", "Attempts at work of a kind that are under way.", ("kind",), registry=self.registry
        )
        self._seconds = Counter(
            "veneer_worker_busy_seconds", "Time spent in attempts.", ("kind",), registry=self.registry
        )
        self._attempts = Counter(
            "veneer_worker_attempts", "Attempts by how they ended.", ("kind", "outcome"), registry=self.registry
        )

        def figure(name: str) -> Callable[[], float]:
            return lambda: float(getattr(progress() or training_job_pb2.TrainingProgress(), name))

        for name, text in _FIGURES.items():
            Gauge(f"veneer_worker_training_{name}", text, registry=self.registry).set_function(figure(name))

    @contextmanager
    def attempt(self, kind: str) -> Iterator[None]:
        """Notes that an attempt at work of a kind is under way while the block runs."""
        began_s = time.monotonic()
        self._busy.labels(kind).inc()
        try:
            yield
        finally:
            self._busy.labels(kind).dec()
            self._seconds.labels(kind).inc(time.monotonic() - began_s)

    def ended(self, kind: str, outcome: str) -> None:
        """Counts an attempt's end."""
        self._attempts.labels(kind, outcome).inc()
