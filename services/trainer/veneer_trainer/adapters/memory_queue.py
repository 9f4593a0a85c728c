"""The queue in memory: what a process without Redis schedules by. The reconciler fills it at each start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from veneer_trainer.domain.fair_share import Lane, turn
from veneer_trainer.ports import QueueContents


class MemoryQueue:
    """A WorkQueue that ends with its process; see `ports.WorkQueue`.

    Args:
        weights: by tenant, its share of turns; 1 for those not named.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._lock = threading.Lock()
        self._waiting: dict[str, Lane] = {}  # by uid, the longest waiting first
        self._taken: dict[str, Lane] = {}
        self._spent: dict[str, float] = {}
        self._now = 0.0

    def add(self, uid: str, lane: Lane) -> bool:
        """See WorkQueue."""
        with self._lock:
            if uid in self._waiting or uid in self._taken:
                return False
            self._waiting[uid] = lane
            return True

    def take(self, worker: str, can_run: Callable[[Lane], bool]) -> str | None:
        """See WorkQueue."""
        with self._lock:
            heads: dict[Lane, tuple[str, str]] = {}
            for place, (uid, lane) in enumerate(self._waiting.items()):
                if can_run(lane):
                    heads.setdefault(lane, (f"{place:020}", uid))
            if not heads:
                return None
            lane = min(heads, key=lambda lane: turn(lane, self._spent, self._now, heads[lane][0]))
            self._now = max(self._spent.get(lane.tenant, 0.0), self._now)
            self._spent[lane.tenant] = self._now + 1 / self._weights.get(lane.tenant, 1.0)
            uid = heads[lane][1]
            self._taken[uid] = self._waiting.pop(uid)
            return uid

    def lanes(self) -> frozenset[Lane]:
        """See WorkQueue."""
        with self._lock:
            return frozenset(self._waiting.values())

    def put_back(self, uid: str) -> None:
        """See WorkQueue."""
        with self._lock:
            if uid in self._taken:
                self._waiting[uid] = self._taken.pop(uid)

    def forget(self, uid: str) -> None:
        """See WorkQueue."""
        with self._lock:
            self._waiting.pop(uid, None)
            self._taken.pop(uid, None)

    def contents(self) -> QueueContents:
        """See WorkQueue."""
        with self._lock:
            return QueueContents(frozenset(self._waiting), frozenset(self._taken))
