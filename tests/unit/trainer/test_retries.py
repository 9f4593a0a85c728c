from dataclasses import replace

import pytest

from veneer_trainer.domain.lifecycle import State, check_transition
from veneer_trainer.domain.retries import RetryPolicy, after_release
from veneer_trainer.domain.spec import Priority
from veneer_trainer.domain.work import Failure, Needs, Work, WorkKind, WorkRef

WORK = Work(
    WorkRef("acme", WorkKind.TRAINING, "a"), "uid", "{}", "", Priority.NORMAL, Needs(), "", State.RUNNING,
    1, 0, 0, 0, 0, 0.0, "", "", None, 0, None, False, 1, 0.0, 0.0, None, None, 0.0,
)  # fmt: skip
POLICY = RetryPolicy(max_deaths=3, max_retries=2, first_delay_s=5, longest_delay_s=12)
DEATH = Failure("LEASE_LOST", "silent", transient=True)
AWAY = Failure("DATASET_UNAVAILABLE", "away", transient=True)
BROKEN = Failure("NON_FINITE_LOSS", "nan")


@pytest.mark.parametrize(("deaths", "then"), [(0, State.QUEUED), (1, State.QUEUED), (2, State.DEAD_LETTERED)])
def test_the_third_death_is_the_last(deaths: int, then: State) -> None:
    state, changes = POLICY.after(replace(WORK, deaths=deaths), DEATH)
    assert (state, changes) == (then, {"failure": DEATH, "deaths": deaths + 1})


def test_waits_double_up_to_a_bound_and_retries_end() -> None:
    assert [POLICY.delay_s(number) for number in (1, 2, 3, 4000)] == [5, 10, 12, 12]
    state, changes = POLICY.after(WORK, AWAY)
    assert (state, changes["retries"], changes["delay_s"]) == (State.QUEUED, 1, 5)
    state, changes = POLICY.after(replace(WORK, retries=2), AWAY)
    assert (state, changes["delay_s"]) == (State.DEAD_LETTERED, 0)


def test_what_cannot_succeed_fails_at_once() -> None:
    assert POLICY.after(WORK, BROKEN) == (State.FAILED, {"failure": BROKEN})


@pytest.mark.parametrize("failure", [DEATH, AWAY, BROKEN])
def test_a_cancel_that_was_asked_for_stands(failure: Failure) -> None:
    assert POLICY.after(replace(WORK, state=State.CANCELLING), failure)[0] is State.CANCELLED


@pytest.mark.parametrize(("failure", "then"), [(DEATH, State.PAUSED), (AWAY, State.PAUSED), (BROKEN, State.FAILED)])
def test_a_pause_that_was_asked_for_stands_unless_there_is_nothing_to_resume(failure: Failure, then: State) -> None:
    state, changes = POLICY.after(replace(WORK, state=State.PAUSING, deaths=2), failure)
    assert state is then
    assert not changes.get("delay_s")


@pytest.mark.parametrize("state", [state for state in State if state.held])
def test_every_end_is_one_that_the_table_allows(state: State) -> None:
    work = replace(WORK, state=state)
    for failure in (DEATH, AWAY, BROKEN):
        check_transition("a", state, POLICY.after(work, failure)[0])
    check_transition("a", state, after_release(work))
