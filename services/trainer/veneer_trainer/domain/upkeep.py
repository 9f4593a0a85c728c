"""What is put right again in the background: holds at the dataset service, and checkpoints nobody needs."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from veneer_rpc.errors import Aborted, NotFound
from veneer_rpc.names import DatasetVersionName
from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.work import Work
from veneer_trainer.ports import CheckpointStore, Datasets, WorkStore

_log = structlog.get_logger(__name__)
_HOLD_AGAIN_S = 3600.0  # a hold lasts a day
_DONE = frozenset({State.SUCCEEDED, State.CANCELLED})


class Upkeep:
    """Runs now and then; each round may be the one that ends something a dead process left.

    Args:
        store: decides.
        datasets: where holds are.
        checkpoints: what is left on disk.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: WorkStore,
        datasets: Datasets,
        checkpoints: CheckpointStore,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._datasets = datasets
        self._checkpoints = checkpoints
        self._clock = clock
        self._placed_s: dict[str, float] = {}  # by uid, when this process placed the hold last

    def holds(self) -> None:
        """Releases the holds of finished work and renews the others, all of them at a process's start.

        Raises:
            Unavailable: the dataset service does not answer; the rest waits for the next round.
        """
        held = self._store.with_holds()
        self._placed_s = {work.uid: self._placed_s[work.uid] for work in held if work.uid in self._placed_s}
        for work in sorted(held, key=lambda work: work.state.terminal):  # what a job planned holds before it lets go
            version = DatasetVersionName.parse(work.dataset_version)
            if work.state.terminal:
                self._datasets.release(work.ref.tenant, version, work.ref.name)
                try:
                    self._store.change(work, held_dataset=False)
                except Aborted:
                    continue  # retried in this moment: it is looked at again in the next round
            elif self._clock() - self._placed_s.get(work.uid, float("-inf")) >= _HOLD_AGAIN_S:
                self._hold(work, version)

    def _hold(self, work: Work, version: DatasetVersionName) -> None:
        try:
            self._datasets.hold(work.ref.tenant, version, work.ref.name)
        except NotFound:
            _log.error("held data is gone", work=work.ref.name, dataset_version=str(version))
        self._placed_s[work.uid] = self._clock()

    def checkpoints(self) -> None:
        """Removes the checkpoints of work that is done or gone."""
        for uid in self._checkpoints.owners():
            work = self._store.find(uid)
            if work is None or work.state in _DONE:
                self._checkpoints.forget(uid)
