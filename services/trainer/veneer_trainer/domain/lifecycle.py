"""Where queued work stands, and the one table of what may follow what.

Training jobs, evaluations and exports live the same life; a store moves them by compare-and-set on (state,
fencing token), and asks this table first.
"""

from __future__ import annotations

from enum import Enum

from veneer_rpc.errors import FailedPrecondition


class State(Enum):
    """Where a piece of queued work stands."""

    QUEUED = "queued"
    LEASED = "leased"
    RUNNING = "running"
    PUBLISHING = "publishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DEAD_LETTERED = "dead_lettered"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"

    @property
    def terminal(self) -> bool:
        """True when nothing follows by itself; a retry may still queue failed work again."""
        return self in TERMINAL

    @property
    def held(self) -> bool:
        """True when a worker holds a lease on the work."""
        return self in HELD


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.DEAD_LETTERED})
HELD = frozenset({State.LEASED, State.RUNNING, State.PUBLISHING, State.PAUSING, State.CANCELLING})

# An attempt may end, die or be given back in any held state: it is queued again, fails, or is buried.
_ENDED = {State.QUEUED, State.FAILED, State.DEAD_LETTERED}

TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.LEASED, State.PAUSED, State.CANCELLED, State.FAILED}),
    State.LEASED: frozenset({State.RUNNING, State.PAUSING, State.CANCELLING, *_ENDED}),
    State.RUNNING: frozenset({State.PUBLISHING, State.PAUSING, State.CANCELLING, *_ENDED}),
    # What is being published is done: it is neither paused nor cancelled any more.
    State.PUBLISHING: frozenset({State.SUCCEEDED, *_ENDED}),
    # A run may reach its end before it hears of the pause or the cancel.
    State.PAUSING: frozenset({State.PAUSED, State.PUBLISHING, State.CANCELLING, *_ENDED}),
    State.CANCELLING: frozenset({State.CANCELLED, State.FAILED}),
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    State.FAILED: frozenset({State.QUEUED}),
    State.DEAD_LETTERED: frozenset({State.QUEUED}),
    State.SUCCEEDED: frozenset(),
    State.CANCELLED: frozenset(),
}


def check_transition(work: str, now: State, then: State) -> None:
    """Says whether work may go from one state to another.

    Args:
        work: the resource's name, for the error.
        now: the state it is in.
        then: the state it should go to.

    Raises:
        FailedPrecondition: the table has no such transition.
    """
    if then not in TRANSITIONS[now]:
        raise wrong_state(work, now, then)


def wrong_state(work: str, now: State, then: State) -> FailedPrecondition:
    """Returns the refusal of a transition."""
    return FailedPrecondition(
        "WRONG_STATE",
        f"{work} is {now.name} and cannot become {then.name}",
        metadata={"state": now.name},
        resource=work,
    )
