"""Whose turn it is: lanes of waiting work, and a weighted fair share of turns between tenants.

Start-time fair queuing (Goyal, Vin, Cheng: "Start-time Fair Queueing", SIGCOMM 1996), counted in turns: each
turn costs a tenant 1 / weight; the tenant with the least spent goes next; who comes back after a pause starts
at the present, so that idling saves nothing up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Self

from veneer_trainer.domain.work import Work

_RANKS = {"high": 0, "normal": 1, "low": 2}
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Lane:
    """Waiting work that is alike to a scheduler: of one tenant, kind and priority, for the same workers.

    Needed memory is counted in whole GiB, so that there are few lanes.
    """

    tenant: str
    kind: str
    priority: str
    model_digest: str
    dtype: str
    memory_gib: int

    def __str__(self) -> str:
        return "|".join(str(part) for part in astuple(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what `str` wrote."""
        tenant, kind, priority, model_digest, dtype, memory_gib = text.split("|")
        return cls(tenant, kind, priority, model_digest, dtype, int(memory_gib))

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
