"""A registry in memory: versions count up, and end with the process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer_rpc.names import AdapterVersionName
from veneer_trainer.domain.jobs import TrainingJob
from veneer_trainer.domain.spec import TrainingSpec
from veneer_trainer.ports import PublishedVersion, PublishHeader


class MemoryRegistry:
    """A Registry that keeps names and digests alone; see `ports.Registry`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: Counter[tuple[str, str]] = Counter()
        self._of_job: dict[str, PublishedVersion] = {}

    def publish(
        self, tenant: str, job: TrainingJob, header: PublishHeader, folder: Path, fence: Callable[[], Any]
    ) -> PublishedVersion:
        """See Registry."""
        assert job.spec.adapter is not None  # noqa: S101  # a job that is not an estimate names one
        with self._lock:
            fence()
            if job.work.uid not in self._of_job:
                adapter = job.spec.adapter.adapter
                self._latest[tenant, adapter] += 1
                name = AdapterVersionName(adapter, self._latest[tenant, adapter])
                self._of_job[job.work.uid] = PublishedVersion(name, header.digest)
            return self._of_job[job.work.uid]

    def check_adapter(self, tenant: str, spec: TrainingSpec) -> None:
        """See Registry."""


class NoEvaluations:
    """An EvaluationPlanner that plans none."""

    def plan(self, tenant: str, job: TrainingJob) -> tuple[str, ...]:
        """See EvaluationPlanner."""
        return ()

    def settle(self, tenant: str, evaluations: object) -> None:
        """See EvaluationPlanner."""
