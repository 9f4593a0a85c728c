"""Whose turn it is: lanes of waiting work, and a weighted fair share of turns between tenants.

Start-time fair queuing (Goyal, Vin, Cheng: "Start-time Fair Queueing", SIGCOMM 1996), counted in turns: each
turn costs a tenant 1 / weight; the tenant with the least spent goes next; who comes back after a pause starts
at the present, so that idling saves nothing up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Self

from veneer_trainer.domain.work import Work

_RANKS = {"high": 0, "normal": 1, "low": 2}
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Lane:
    """Waiting work that is alike to a scheduler: of one tenant, kind and priority, for the same workers.

    Needed memory is counted in whole GiB, so that there are few lanes. What was lost once shares with nobody any more:
    it would take the others down with it again.
    """

    tenant: str
    kind: str
    priority: str
    model_digest: str
    dtype: str
    memory_gib: int
    shares: str = ""

    def __str__(self) -> str:
        return "|".join(str(part) for part in astuple(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what `str` wrote."""
        tenant, kind, priority, model_digest, dtype, memory_gib, *shares = text.split("|")  # none in older queues
        return cls(tenant, kind, priority, model_digest, dtype, int(memory_gib), *shares)

    @classmethod
    def of(cls, work: Work) -> Self:
        """Returns the lane that work waits in."""
        needs = work.needs
        return cls(
            work.ref.tenant,
            work.ref.kind.value,
            work.priority.value,
            needs.model_digest,
            needs.dtype,
            -(-needs.memory_bytes // _GIB),
            "" if work.retries or work.deaths else needs.shares,
        )

    def may_join(self, other: Lane, waiting: Iterable[Lane]) -> bool:
        """Says whether this lane's work may share the passes of another's, which a worker has begun.

        Only one tenant's do, and only while nothing waits for that worker whose turn would come sooner: sharing makes
        nobody wait.

        Args:
            other: the lane of what is trained.
            waiting: all that the worker could do next.
        """
        alike = ("tenant", "kind", "model_digest", "dtype", "shares")
        if not self.shares or any(getattr(self, name) != getattr(other, name) for name in alike):
            return False
        return not any(
            (lane.tenant != self.tenant or _RANKS[lane.priority] < _RANKS[self.priority])
            and (lane.priority != "low" or self.priority == "low")
            for lane in waiting
        )


def turn(lane: Lane, spent: Mapping[str, float], now: float, head: str) -> tuple[bool, float, str, int, str]:
    """Returns what lanes are sorted by: the least one's first work goes next.

    Args:
        lane: a lane where work waits.
        spent: by tenant, where its last turn ended in virtual time.
        now: virtual time, where the last turn of all began.
        head: when the lane's first work came to wait; sorts as it is older.
    """
    start = max(spent.get(lane.tenant, 0.0), now)
    return lane.priority == "low", start, lane.tenant, _RANKS[lane.priority], head
