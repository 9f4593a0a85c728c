"""What becomes of work whose attempt did not finish it: tried again, after a while, or no more."""

from __future__ import annotations

from dataclasses import dataclass

from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.work import Changes, Failure, Work

DEATHS = frozenset({"LEASE_LOST", "PROGRESS_STALLED", "PROCESS_DIED"})
"""Reasons that count as an attempt's death; the last is a worker's, for its own child."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and how long in between.

    Attributes:
        max_deaths: attempts that may die in a row without storing a further checkpoint.
        max_retries: transient failures that are queued again; afterwards the work is dead-lettered too.
        first_delay_s: wait before the first retry; it doubles with each.
        longest_delay_s: bound of that.
    """

    max_deaths: int = 3
    max_retries: int = 8
    first_delay_s: float = 5.0
    longest_delay_s: float = 300.0

    def delay_s(self, retries: int) -> float:
        """Returns the wait before the retry of this number, from 1."""
        return float(min(self.first_delay_s * 2 ** min(retries - 1, 32), self.longest_delay_s))

    def after(self, work: Work, failure: Failure) -> tuple[State, Changes]:
        """Returns where work goes whose attempt failed or died, and what changes with it.

        What its owner asked for meanwhile stands: it is cancelled, or paused unless it cannot succeed.
        """
        changes: Changes = {"failure": failure}
        if work.state is State.CANCELLING:
            return State.CANCELLED, changes
        if failure.reason in DEATHS:
            changes["deaths"] = work.deaths + 1
            over = changes["deaths"] >= self.max_deaths
        elif failure.transient:
            changes["retries"] = work.retries + 1
            over = changes["retries"] > self.max_retries
            changes["delay_s"] = 0.0 if over else self.delay_s(changes["retries"])
        else:
            return State.FAILED, changes
        if work.state is State.PAUSING:
            return State.PAUSED, changes | {"delay_s": 0.0}
        return (State.DEAD_LETTERED if over else State.QUEUED), changes


def after_release(work: Work) -> State:
    """Returns where work goes that its worker gave back; the attempt does not count."""
    owners = {State.CANCELLING: State.CANCELLED, State.PAUSING: State.PAUSED}
    return owners.get(work.state, State.QUEUED)
