"""What is shared and kept never changes an answer, and never crosses tenants or adapters. The engine's core alone."""

# ruff: noqa: ANN401  # fixtures of the conftest next to this

import dataclasses
from typing import Any

import numpy as np
import pytest

from veneer_inference.engine import messages
from veneer_inference.ports import EnginePrompt, Sampling, Step, TokenScore


def tokens(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


def scores(steps: list[Step]) -> list[TokenScore]:
    return [score for step in steps for score in step.scores]


def conversation(kit: Any, seed: int, grids: tuple[tuple[int, int], ...] = ()) -> EnginePrompt:
    """A prompt of 70 tokens and its pictures, as the service makes it: a picture's digest stands for its pixels."""
    return kit.prompt(seed, 70, grids)


def longer(prompt: EnginePrompt, *ids: int) -> EnginePrompt:
    """The prompt and more text."""
    ids_T = np.concatenate([prompt.ids_T, np.array(ids, np.int64)])
    return dataclasses.replace(prompt, ids_T=ids_T, positions_3_T=np.tile(np.arange(len(ids_T)), (3, 1)))


@pytest.mark.parametrize("step_tokens", [512, 24])
def test_answers_are_the_same_with_and_without(kit: Any, step_tokens: int) -> None:
    """Twice alone, then in a mixed batch, and a second turn on top of each answer."""
    wearing = [None, *kit.adapters]
    prompts = [conversation(kit, 1), conversation(kit, 2, ((4, 6),)), conversation(kit, 3, ((8, 2), (6, 6)))]
    asked = [(prompt, saved, "t") for prompt in prompts for saved in wearing]
    with_cache, without = kit.core(step_tokens=step_tokens, blocks=400), kit.core(prefix_cache=False, blocks=400)
    right = without.ask(*asked)
    alone = [with_cache.ask(each)[0] for each in asked]
    assert with_cache.counters["cached_tokens"] == 0
    again = [with_cache.ask(each)[0] for each in asked]
    together = with_cache.ask(*asked)
    for found in (alone, again, together):
        assert list(map(tokens, found)) == list(map(tokens, right))
        for left, other in zip(found, right, strict=True):
            assert [score.logprob for score in scores(left)] == pytest.approx(
                [score.logprob for score in scores(other)], abs=1e-4
            )
    for (prompt, _, _), steps in zip(asked, again, strict=True):
        assert steps[0].cached_tokens == (len(prompt.ids_T) - 1) // 16 * 16
    turns = [
        (longer(prompt, *tokens(steps), 7, 8, 9), saved, t)
        for (prompt, saved, t), steps in zip(asked, right, strict=True)
    ]
    second = with_cache.ask(*turns)
    assert list(map(tokens, second)) == list(map(tokens, without.ask(*turns)))
    assert all(steps[0].cached_tokens >= len(turn[0].ids_T) - 32 for steps, turn in zip(second, turns, strict=True))
    assert without.counters["cached_tokens"] == 0


def test_nothing_is_shared_across_tenants_adapters_or_pictures(kit: Any) -> None:
    core = kit.core(blocks=400)
    prompt = conversation(kit, 4, ((4, 6),))
    core.ask((prompt, kit.adapters[0], "t"))
    other_picture = dataclasses.replace(
        prompt, picture_digests=("f" * 64,), patches_N_P=prompt.patches_N_P[::-1].copy()
    )
    unnamed = dataclasses.replace(prompt, picture_digests=())
    for each in (
        (prompt, kit.adapters[0], "u"),
        (prompt, kit.adapters[1], "t"),
        (prompt, None, "t"),
        (unnamed, kit.adapters[0], "t"),
    ):
        assert core.ask(each)[0][0].cached_tokens == 0
    before_the_picture = 35 // 16 * 16
    assert core.ask((other_picture, kit.adapters[0], "t"))[0][0].cached_tokens == before_the_picture
    assert tokens(core.ask((other_picture, kit.adapters[0], "t"))[0]) == kit.answer(other_picture, kit.adapters[0], 20)
    assert core.ask((prompt, kit.adapters[0], "t"))[0][0].cached_tokens == 64


def test_a_prompt_that_fills_its_blocks_is_computed_to_its_end_again(kit: Any) -> None:
    """Its last token is never taken from a kept block: the answer's first follows from it."""
    core, prompt = kit.core(), kit.prompt(8, 64)
    for cached in (0, 48):
        (steps,) = core.ask((prompt, kit.adapters[0], "t"))
        assert (steps[0].cached_tokens, tokens(steps)) == (cached, kit.answer(prompt, kit.adapters[0], 20))


def test_a_picture_of_another_size_is_another_picture(kit: Any) -> None:
    """As under another bound on pixels: the same file, other patches."""
    core = kit.core()
    digest = ("f" * 64,)
    for grid in ((4, 6), (6, 4)):
        prompt = dataclasses.replace(kit.prompt(9, 20, (grid,)), picture_digests=digest)
        assert tokens(core.ask((prompt, None, "t"))[0]) == kit.answer(prompt, None, 20)
    assert core.counters["feature_hits"] == 0


def test_a_second_picture_after_a_kept_first_one_is_seen_alone(kit: Any) -> None:
    core = kit.core(blocks=400)
    prompt = kit.prompt(10, 70, ((2, 26), (4, 6)))  # the first picture ends with a block
    core.ask((prompt, None, "t"))
    patches = prompt.patches_N_P.copy()
    patches[52:] = patches[52:][::-1]
    other = dataclasses.replace(prompt, picture_digests=(prompt.picture_digests[0], "f" * 64), patches_N_P=patches)
    (steps,) = core.ask((other, None, "t"))
    assert (steps[0].cached_tokens, tokens(steps)) == (48, kit.answer(other, None, 20))


def test_scores_are_the_same_with_and_without(kit: Any) -> None:
    prompt = kit.prompt(5, 70, ((4, 6),), supervised=15)
    right = scores(kit.core(prefix_cache=False).ask((prompt, kit.adapters[1], "t"), sampling=None)[0])
    core = kit.core()
    for _ in range(2):
        found = scores(core.ask((prompt, kit.adapters[1], "t"), sampling=None)[0])
        assert [score.token_id for score in found] == [score.token_id for score in right]
        assert [score.logprob for score in found] == pytest.approx([score.logprob for score in right], abs=1e-4)
    assert core.counters["cached_tokens"] == (len(prompt.ids_T) - 15 - 1) // 16 * 16


def test_kept_blocks_give_way_to_requests(kit: Any) -> None:
    core = kit.core(blocks=8)  # 128 tokens: one request at a time
    for seed in (1, 2, 1, 3, 1):
        prompt = conversation(kit, seed)
        assert tokens(core.ask((prompt, None, "t"))[0]) == kit.answer(prompt, None, 20)


def test_a_picture_in_flight_is_encoded_once(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    tower = type(kit.model.visual)
    start = tower.start

    def counted(self: Any, patches: Any, grids: Any, lora: Any) -> Any:
        seen.append(len(grids))
        return start(self, patches, grids, lora)

    monkeypatch.setattr(tower, "start", counted)
    core = kit.core(blocks=400)
    prompts = [longer(kit.prompt(6, 20, ((4, 6),)), *range(number)) for number in range(4)]
    wearing = [None, kit.adapters[0], None, kit.adapters[2]]  # the last one touches the tower
    steps = core.ask(*((prompt, saved, "t") for prompt, saved in zip(prompts, wearing, strict=True)))
    assert sum(seen) == 2
    assert [tokens(each) for each in steps] == [kit.answer(p, s, 20) for p, s in zip(prompts, wearing, strict=True)]


def test_a_shared_picture_outlives_the_request_that_brought_it(kit: Any) -> None:
    core = kit.core().core
    prompt = messages.Prompt.of(kit.prompt(7, 20, ((4, 6),)))
    for key in (1, 2):
        core.handle(messages.Generate(key, "t", "", prompt, Sampling(3)))
    for sequence in core._scheduler.admit():
        core._begin(core._requests[sequence.key])
    core.handle(messages.Cancel(1))
    found = []
    while not core.idle:
        found += [each.step for each in core.step().progress]
    assert [token for step in found for token in step.token_ids] == kit.answer(kit.prompt(7, 20, ((4, 6),)), None, 3)
