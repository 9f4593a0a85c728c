"""Guesses change how many passes an answer takes, and nothing that it says. The engine's core alone."""

# ruff: noqa: ANN401  # fixtures of the conftest next to this

from typing import Any

import numpy as np
import pytest

from veneer_inference.ports import EnginePrompt, Sampling, Step

SAMPLINGS = (
    Sampling(40, logprobs=1),
    Sampling(40, temperature=0.3, seed=4, logprobs=1),
    Sampling(40, temperature=1.5, top_p=0.9, top_k=50, seed=5, logprobs=1),
    Sampling(40, repetition_penalty=1.3, logprobs=1),
)


def tokens(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


def repetitive(kit: Any, seed: int, grids: tuple[tuple[int, int], ...] = ()) -> EnginePrompt:
    """A prompt that says the same thing four times, and an answer's beginning after it."""
    prompt = kit.prompt(seed, 8, grids)
    ids_T = np.concatenate([prompt.ids_T, *[np.arange(seed, seed + 9)] * 4])
    return EnginePrompt(
        ids_T, np.tile(np.arange(len(ids_T)), (3, 1)), 0, prompt.grids_n_3, prompt.patches_N_P, prompt.picture_digests
    )


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_answers_are_the_same_with_and_without(kit: Any, sampling: Sampling) -> None:
    """Every answer twice, so that the second time it is guessed; alone, and in a batch of all."""
    asked = [
        (repetitive(kit, seed, ((4, 6),) if seed % 2 else ()), saved, "t")
        for seed, saved in enumerate((None, *kit.adapters))
    ]
    guessing, plain = kit.core(blocks=200), kit.core(blocks=200, speculation=False)
    right = [tokens(steps) for steps in plain.ask(*asked, sampling=sampling)]
    for _ in range(2):
        assert [tokens(guessing.ask(each, sampling=sampling)[0]) for each in asked] == right
    together = guessing.ask(*asked, sampling=sampling)
    assert list(map(tokens, together)) == right
    for steps in together:
        assert [score.token_id for step in steps for score in step.scores] == tokens(steps)
    assert "drafted_tokens" not in plain.counters or plain.counters["drafted_tokens"] == 0
    if sampling.repetition_penalty == 1:
        assert guessing.counters["accepted_tokens"] > 40
        assert sum(len(step.token_ids) for step in together[0]) == 40
        assert len(together[0]) < 30
    else:
        assert guessing.counters["drafted_tokens"] == 0


def test_an_answer_ends_within_its_guesses(kit: Any) -> None:
    core, prompt = kit.core(), kit.prompt(1, 20)
    right = tokens(core.ask((prompt, None, "t"), sampling=Sampling(30))[0])
    place = next(place for place in range(8, 30) if right[place] not in right[:place])
    stopped = core.ask((prompt, None, "t"), sampling=Sampling(30, stop_ids=(right[place],)))[0]
    assert tokens(stopped) == right[: place + 1]
    assert [step.finish for step in stopped] == [""] * (len(stopped) - 1) + ["stop"]
    assert len(stopped) < place + 1
    for most in (1, 2, 3, 7):
        short = core.ask((prompt, None, "t"), sampling=Sampling(most))[0]
        assert tokens(short) == right[:most]
        assert short[-1].finish == "length"


def test_nobody_guesses_by_anothers_answers(kit: Any) -> None:
    core, prompt = kit.core(blocks=200), kit.prompt(2, 20)
    core.ask((prompt, kit.adapters[0], "t"), sampling=Sampling(30))
    before = core.counters["accepted_tokens"]
    core.ask((prompt, kit.adapters[0], "u"), sampling=Sampling(30))
    assert core.counters["accepted_tokens"] == 2 * before
    accepted = core.counters["accepted_tokens"]
    core.ask((prompt, kit.adapters[0], "t"), sampling=Sampling(30))
    assert core.counters["accepted_tokens"] - accepted >= 20


def test_many_answers_do_not_guess(kit: Any) -> None:
    core, prompt = kit.core(blocks=400), kit.prompt(3, 20)
    right = tokens(core.ask((prompt, None, "t"), sampling=Sampling(12))[0])
    drafted = core.counters.get("drafted_tokens", 0)
    steps = core.ask(*[(prompt, None, "t")] * 17, sampling=Sampling(12))
    assert all(tokens(each) == right for each in steps)
    assert core.counters["drafted_tokens"] == drafted
