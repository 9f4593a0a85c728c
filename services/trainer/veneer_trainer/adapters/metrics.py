"""What Prometheus reads of the trainer: work by state, what happened to it, and the figures of what is under lease."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric

from veneer_trainer.domain.jobs import job_of
from veneer_trainer.domain.lifecycle import HELD, State
from veneer_trainer.domain.work import WorkKind
from veneer_trainer.domain.workers import Workers
from veneer_trainer.ports import History, WorkStore

_FIGURES = {
    "step": "Optimiser steps done.",
    "total_steps": "Optimiser steps in all.",
    "loss": "Mean loss per supervised token, in nats.",
    "validation_loss": "The latest validation loss.",
    "learning_rate": "Learning rate of the step.",
    "gradient_norm": "Norm of the gradient before clipping.",
    "tokens_per_second": "Tokens of all kinds.",
    "rows_per_second": "Rows.",
    "peak_memory_bytes": "Peak resident memory of the training process.",
    "remaining_s": "Time until the last step.",
}


class CountedHistory:
    """A History that also counts its events.

    Args:
        history: where events go.
        registry: gets the counter.
    """

    def __init__(self, history: History, registry: CollectorRegistry) -> None:
        self._history = history
        self._events = Counter(
            "veneer_trainer_events", "What happened to work, such as leased, checkpoint, published, ended; the state"
            " that an attempt's end led to.", ("event", "state"), registry=registry,
        )  # fmt: skip

    def record(self, event: str, **facts: str | int | float | bool) -> None:
        """See History."""
        self._events.labels(event, str(facts.get("state", ""))).inc()
        self._history.record(event, **facts)


class WorkCollector:
    """Reads the store at each scrape.

    Args:
        store: of all work.
        workers: those that asked for work lately.
    """

    def __init__(self, store: WorkStore, workers: Workers) -> None:
        self._store = store
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """Yields the families of one scrape."""
        work = GaugeMetricFamily("veneer_trainer_work", "Work by where it stands.", labels=("kind", "state"))
        counts = self._store.counts()
        for kind in WorkKind:
            for state in State:
                work.add_metric((kind.name.lower(), state.value), counts.get((kind, state), 0))
        yield work
        known = len(self._workers.known())
        yield GaugeMetricFamily("veneer_trainer_workers", "Workers that asked for work lately.", value=known)
        yield from self._jobs()

    def _jobs(self) -> Iterator[Metric]:
        """The figures of jobs under lease: as many series as there are workers, not as there are jobs."""
        families = {}
        for name, text in _FIGURES.items():
            unit_name = name.removesuffix("_s") + ("_seconds" if name.endswith("_s") else "")
            families[name] = GaugeMetricFamily(f"veneer_job_{unit_name}", text, labels=("tenant", "job"))
        for work in self._store.in_states(HELD):
            if work.ref.kind is WorkKind.TRAINING and (progress := job_of(work).progress) is not None:
                for name, family in families.items():
                    if (value := getattr(progress, name)) is not None:
                        family.add_metric((work.ref.tenant, work.ref.id), value)
        yield from families.values()
