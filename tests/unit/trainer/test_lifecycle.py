import pytest

from veneer_rpc.errors import FailedPrecondition
from veneer_trainer.domain.lifecycle import HELD, TERMINAL, TRANSITIONS, State, check_transition


def reachable(start: State) -> set[State]:
    seen, waiting = {start}, [start]
    while waiting:
        following = TRANSITIONS[waiting.pop()] - seen
        seen |= following
        waiting += following
    return seen


def test_every_state_can_be_reached_and_can_come_to_a_terminal_one() -> None:
    assert reachable(State.QUEUED) == set(State)
    assert all(reachable(state) & TERMINAL for state in State)


def test_success_and_cancel_are_for_ever_while_failures_may_be_retried() -> None:
    assert TRANSITIONS[State.SUCCEEDED] == TRANSITIONS[State.CANCELLED] == frozenset()
    assert TRANSITIONS[State.FAILED] == TRANSITIONS[State.DEAD_LETTERED] == {State.QUEUED}


def test_a_lost_lease_leads_back_to_the_queue_unless_a_cancel_was_asked_for() -> None:
    back = {state for state in HELD if State.QUEUED in TRANSITIONS[state]}
    assert back == HELD - {State.CANCELLING}


@pytest.mark.parametrize("state", sorted(TERMINAL, key=lambda state: state.name))
def test_a_finished_job_cannot_be_cancelled(state: State) -> None:
    with pytest.raises(FailedPrecondition, match=rf"trainingJobs/a is {state.name} and cannot become CANCELLING"):
        check_transition("trainingJobs/a", state, State.CANCELLING)


def test_published_work_is_neither_paused_nor_cancelled() -> None:
    assert not TRANSITIONS[State.PUBLISHING] & {
        State.PAUSING,
        State.CANCELLING,
        State.PAUSED,
        State.CANCELLED,
    }
