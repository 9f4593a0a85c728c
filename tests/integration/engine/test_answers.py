"""What the engine process answers, held against `veneer_vlm` itself."""

# ruff: noqa: ANN401  # fixtures of the conftest next to this

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from veneer_inference.engine.client import EngineProcess
from veneer_inference.ports import Sampling

pytestmark = pytest.mark.asyncio(loop_scope="module")
GREEDY = Sampling(12)
SHAPES: tuple[dict[str, Any], ...] = (
    {"tokens": 6},
    {"tokens": 40},
    {"tokens": 1},
    {"tokens": 8, "grids": ((4, 6),)},
    {"tokens": 5, "grids": ((8, 2), (6, 6))},
    {"tokens": 90},
    {"tokens": 7, "grids": ((2, 2),)},
    {"tokens": 17},
)


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=[512, 16])
async def engine(kit: Any, request: pytest.FixtureRequest) -> AsyncIterator[EngineProcess]:
    """With all adapters; takes prompts whole, and in pieces."""
    engine = await EngineProcess.start(kit.base, 1, step_tokens=request.param)
    await kit.load_all(engine)
    yield engine
    await engine.close()


async def test_an_answer_alone_is_the_models_own(kit: Any, engine: Any) -> None:
    answers = set()
    for saved in (None, *kit.adapters):
        for seed, shape in enumerate(SHAPES[:5]):
            prompt = kit.prompt(seed, **shape)
            tokens = await kit.tokens(engine, prompt, saved, GREEDY)
            assert tokens == kit.answer(prompt, saved, 12)
            answers.add(tuple(tokens))
    assert len(answers) > 15  # the adapters do change what is said
    assert engine.stats().kv_tokens_in_use == 0


async def test_answers_in_one_batch_are_those_alone(kit: Any, engine: Any) -> None:
    """8 requests at once over three adapters and the base; prompts whole, and in pieces."""
    wearing = [None, *kit.adapters] * 2
    prompts = [kit.prompt(seed, **shape) for seed, shape in enumerate(SHAPES)]
    before = engine.stats().steps
    answers = await asyncio.gather(
        *(kit.tokens(engine, prompt, saved, GREEDY) for prompt, saved in zip(prompts, wearing, strict=True))
    )
    assert answers == [kit.answer(prompt, saved, 12) for prompt, saved in zip(prompts, wearing, strict=True)]
    assert engine.stats().steps - before < 60  # they have not gone one by one


async def test_a_picture_seen_before_answers_the_same(kit: Any, engine: Any) -> None:
    prompt = kit.prompt(30, 8, ((4, 6),))
    wearing = [None, *kit.adapters, *kit.adapters, None]
    before = engine.stats().counters
    answers = [await kit.tokens(engine, prompt, saved, GREEDY) for saved in wearing]
    await kit.tokens(engine, prompt, None, GREEDY, tenant="u")
    assert answers == [kit.answer(prompt, saved, 12) for saved in wearing]
    after = engine.stats().counters
    # One adapter touches the tower, the others see what the base sees; another tenant shares nothing.
    assert after["feature_misses"] - before["feature_misses"] == 3
    assert after["feature_hits"] - before["feature_hits"] == 6


async def test_a_seed_draws_the_same_in_any_batch(kit: Any, engine: Any) -> None:
    prompt = kit.prompt(1)

    def sampling(seed: int) -> Sampling:
        return Sampling(12, temperature=1.2, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=seed)

    alone = [await kit.tokens(engine, prompt, kit.adapters[1], sampling(seed)) for seed in range(6)]
    together = await asyncio.gather(
        *(kit.tokens(engine, prompt, kit.adapters[1], sampling(seed)) for seed in range(6)),
        *(kit.tokens(engine, kit.prompt(seed, 30), kit.adapters[0], GREEDY) for seed in range(6)),
    )
    assert together[:6] == alone
    assert len(set(map(tuple, alone))) > 3


async def test_an_answer_ends_where_it_must(kit: Any, engine: Any) -> None:
    prompt = kit.prompt(1)
    right = kit.answer(prompt, None, 12)
    place = next(place for place in range(2, 12) if right[place] not in right[:place])
    steps = await kit.steps(engine, prompt, None, Sampling(12, stop_ids=(right[place],)))
    assert [token for step in steps for token in step.token_ids] == right[: place + 1]
    assert [step.finish for step in steps] == [""] * place + ["stop"]
    # The context ends an answer too.
    prompt = kit.prompt(1, 505)
    steps = await kit.steps(engine, prompt, None, Sampling(100))
    assert len(steps) == 512 - 505
    assert steps[-1].finish == "length"


async def test_log_probabilities_are_the_models(kit: Any, engine: Any) -> None:
    prompt = kit.prompt(3, 8, ((4, 6),))
    steps = await kit.steps(engine, prompt, kit.adapters[2], Sampling(1, logprobs=3))
    right_V = kit.logprobs(prompt, kit.adapters[2])[-1]
    score = steps[0].scores[0]
    values, ids = right_V.topk(3)
    assert score.token_id == int(ids[0])
    assert score.logprob == pytest.approx(float(values[0]), abs=1e-4)
    assert [token for token, _ in score.top] == ids.tolist()
    assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("top", [0, 2])
async def test_scores_are_the_models(kit: Any, engine: Any, top: int) -> None:
    wearing = [None, *kit.adapters]
    prompts = [kit.prompt(seed, **(shape | {"tokens": 40}), supervised=15) for seed, shape in enumerate(SHAPES[2:6])]
    found = await asyncio.gather(
        *(
            engine.score("t", saved.digest if saved else "", prompt, top)
            for prompt, saved in zip(prompts, wearing, strict=True)
        ),
    )
    for prompt, saved, scores in zip(prompts, wearing, found, strict=True):
        right_T_V = kit.logprobs(prompt, saved)
        places = prompt.supervised_T.nonzero()[0]
        assert [score.token_id for score in scores] == prompt.ids_T[places].tolist()
        right = [float(right_T_V[place - 1, prompt.ids_T[place]]) for place in places]
        assert [score.logprob for score in scores] == pytest.approx(right, abs=1e-4)
        assert all(len(score.top) == top for score in scores)
    assert engine.stats().kv_tokens_in_use == 0


async def test_bfloat16_answers_near_float32(kit: Any) -> None:
    engine = await EngineProcess.start(kit.base, 1, dtype="bfloat16")
    await kit.load_all(engine)
    prompt = kit.prompt(2, 20, supervised=10)
    scores = await engine.score("t", kit.adapters[1].digest, prompt, 0)
    right_T_V = kit.logprobs(prompt, kit.adapters[1])
    right = [float(right_T_V[place - 1, prompt.ids_T[place]]) for place in prompt.supervised_T.nonzero()[0]]
    mean = sum(abs(score.logprob - value) for score, value in zip(scores, right, strict=True)) / len(right)
    assert mean < 0.5
    assert engine.info.dtype == "bfloat16"
    await engine.close()
