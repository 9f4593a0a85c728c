"""Guesses: what followed before, within bounds, and never another tenant's."""

import pytest

from veneer_inference.engine.drafts import NGRAM, Answers, Continuations
from veneer_inference.engine.pace import StepPace


def test_what_followed_last_is_guessed() -> None:
    said = Continuations()
    said.add([1, 2, 3, 4, 5, 1, 2, 3, 6, 7])
    assert said.after([9, 1, 2, 3], 2) == [6, 7]
    assert said.after([2, 3, 4], 8) == [5, 1, 2, 3, 6, 7]
    assert said.after([1, 2], 8) == []
    assert said.after([7, 7, 7], 8) == []
    said.add([8])
    assert said.after([3, 6, 7], 8) == [8]


def test_nothing_is_guessed_across_a_gap() -> None:
    said = Continuations()
    said.add([1, 2, 3, 4])
    said.gap()
    said.add([5, 6, 7, 8])
    assert said.after([1, 2, 3], 8) == [4]
    assert said.after([2, 3, 4], 8) == []
    assert said.after([5, 6, 7], 8) == [8]


def test_answers_are_remembered_by_tenant_and_adapter_within_bounds() -> None:
    answers = Answers()
    answers.add("t", "a", [1, 2, 3, 4])
    assert answers.of("u", "a") is None
    assert answers.of("t", "b") is None
    known = answers.of("t", "a")
    assert known is not None
    assert known.after([1, 2, 3], 4) == [4]
    for number in range(64):
        answers.add("t", f"other {number}", [1] * NGRAM)
    assert answers.of("t", "a") is None
    for _ in range(20):
        answers.add("t", "long", list(range(5000)))
        known = answers.of("t", "long")
        assert known is not None
        assert len(known) <= 8193


def test_a_step_takes_as_many_tokens_of_prompts_as_others_can_wait_for() -> None:
    pace = StepPace()
    assert pace.tokens(512) == 512  # nothing is known
    pace.computed(0.1, 0, 3)  # says nothing of prompts
    assert pace.tokens(512) == 512
    pace.computed(2.0, 0, 500)
    assert pace.tokens(512) == 144  # 0.6 s at 4 ms each, whole eights
    assert pace.tokens(512, seen_s=0.4) == 48
    assert pace.tokens(512, seen_s=1.0) == 0
    for _ in range(50):
        pace.computed(0.2, 8, 0)
    assert pace.room_s == pytest.approx(0.4)
    for _ in range(50):
        pace.computed(0.5, 8, 0)
    assert pace.room_s == pytest.approx(0.125)  # a fifth of a step at least
    for _ in range(50):
        pace.computed(0.9, 8, 100)  # 0.5 of it are the answers'
        assert pace.tokens(512) == 24
    for _ in range(50):
        pace.computed(1.2, 8, 0)
    assert pace.room_s == pytest.approx(0.3)
    pace.computed(100.0, 0, 100)
    assert pace.tokens(512) == 8
    for _ in range(50):
        pace.computed(0.01, 0, 500)
    assert pace.tokens(512) == 512
