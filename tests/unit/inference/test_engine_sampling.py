import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from veneer_inference.engine.sampling import Sampler, Wish, scores_of, uniform
from veneer_inference.ports import Sampling
from veneer_vlm.config import ModelConfig
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.weights import random_model

VOCABULARY, IMAGE = 1000, 990
CONFIG = {
    "model_type": "qwen3_vl",
    "image_token_id": IMAGE,
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 32,
        "rope_scaling": {"mrope_section": [8, 4, 4]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": 32,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [],
    },
}


def model(distinct: int = VOCABULARY) -> VisionLanguageModel:
    """A head with so many distinct rows; the others are all the same."""
    made = random_model(ModelConfig.from_dict(CONFIG), seed=1)
    weight = made.slots()["lm_head.weight"]
    weight.normal_(generator=torch.Generator().manual_seed(1))
    weight[distinct:] = weight[distinct - 1].clone()
    return made


def hidden(rows: int) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(2))


def tokens(made: VisionLanguageModel, hidden_N_D: Tensor, *wishes: Wish) -> list[int]:
    return [choice.token for choice in Sampler(made).choose(hidden_N_D, wishes)]


@pytest.mark.parametrize("distinct", [VOCABULARY, 300])
def test_the_likeliest_token(distinct: int) -> None:
    made = model(distinct)
    hidden_N_D = torch.cat([hidden(50), made.lm_head.weight[distinct - 1][None] * 10])
    logits = made.logits(hidden_N_D)
    logits[:, IMAGE] = -torch.inf
    right = logits.argmax(-1).tolist()
    assert tokens(made, hidden_N_D, *[Wish(Sampling(1), 5)] * 51) == right
    assert tokens(made, hidden_N_D, *[Wish(Sampling(1, logprobs=1), 5)] * 51) == right
    assert right[-1] == distinct - 1  # of many equal rows the first


@pytest.mark.parametrize("wish", [Sampling(1), Sampling(1, logprobs=0), Sampling(1, temperature=1.0)])
@pytest.mark.parametrize("distinct", [VOCABULARY, 300])
def test_the_image_token_is_never_chosen(wish: Sampling, distinct: int) -> None:
    made = model(distinct)
    made.slots()["lm_head.weight"][IMAGE] = 100.0
    hidden_N_D = torch.ones(1, 32)
    assert int(made.logits(hidden_N_D).argmax()) == IMAGE
    assert tokens(made, hidden_N_D, Wish(wish, 5)) != [IMAGE]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    made, hidden_N_D = model(), hidden(3)
    sampling = [Sampling(1, temperature=2.0, seed=seed) for seed in (1, 2, 3)]
    wishes = [Wish(each, 7) for each in sampling]
    together = tokens(made, hidden_N_D, *wishes)
    assert together == [tokens(made, hidden_N_D[row : row + 1], wishes[row])[0] for row in range(3)]
    assert len({tuple(tokens(made, hidden_N_D, *[Wish(sampling[0], place)] * 3)) for place in range(20)}) > 10
    draws = [uniform(seed, place) for seed in range(20) for place in range(50)]
    assert len(set(draws)) == 1000
    assert 0 <= min(draws) < 0.01
    assert 0.99 < max(draws) < 1
    assert sum(draws) / 1000 == pytest.approx(0.5, abs=0.03)


def probabilities(made: VisionLanguageModel, hidden_N_D: Tensor, temperature: float) -> Tensor:
    logits = made.logits(hidden_N_D)[0].double()
    logits[IMAGE] = -torch.inf
    return (logits / temperature).softmax(-1)


def drawn(made: VisionLanguageModel, hidden_N_D: Tensor, draws: int, sampling: Sampling) -> Counter[int]:
    wishes = [Wish(sampling, place) for place in range(draws)]
    return Counter(tokens(made, hidden_N_D.expand(draws, -1), *wishes))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (400, 0.999), (8, 0.5), (300, 1.0)])
def test_tokens_come_as_often_as_they_are_likely(top_k: int, top_p: float) -> None:
    made, hidden_N_D, draws = model(), hidden(1) / 3, 800
    found = drawn(made, hidden_N_D, draws, Sampling(1, temperature=0.5, top_k=top_k, top_p=top_p))
    values, ids = probabilities(made, hidden_N_D, 0.5).sort(descending=True)
    if top_k:
        values, ids = values[:top_k] / values[:top_k].sum(), ids[:top_k]
    kept = int((values.cumsum(-1) < top_p).sum()) + 1
    values, ids = values[:kept] / values[:kept].sum(), ids[:kept]
    assert set(found) <= set(ids.tolist())
    for token, likely in zip(ids[:5].tolist(), values[:5].tolist(), strict=False):
        assert found[token] / draws == pytest.approx(likely, abs=5 * math.sqrt(likely / draws))


def test_the_nucleus_keeps_one_token_at_least() -> None:
    made, hidden_N_D = model(), hidden(1)
    found = drawn(made, hidden_N_D, 20, Sampling(1, temperature=1.0, top_p=1e-9))
    assert set(found) == {tokens(made, hidden_N_D, Wish(Sampling(1), 1))[0]}


def test_repetition_is_penalised() -> None:
    made, hidden_N_D = model(), hidden(1)
    logits = made.logits(hidden_N_D)[0]
    first, second = logits.topk(2).indices.tolist()
    strong = Sampling(1, repetition_penalty=100.0)
    assert tokens(made, hidden_N_D, Wish(strong, 1, {first})) == [second]
    assert tokens(made, hidden_N_D, Wish(strong, 1, {second})) == [first]
    everything = set(range(VOCABULARY))
    negative = -hidden_N_D
    right = made.logits(negative)[0].argmax().item()
    assert tokens(made, negative, Wish(Sampling(1, repetition_penalty=1.5), 1, everything)) == [right]


def test_repetition_is_penalised_below_zero_too() -> None:
    made = model()
    made.slots()["lm_head.weight"].abs_().neg_()
    hidden_N_D = torch.ones(1, 32)
    first, second = made.logits(hidden_N_D)[0].topk(2).indices.tolist()
    assert made.logits(hidden_N_D).max() < 0
    assert tokens(made, hidden_N_D, Wish(Sampling(1, repetition_penalty=100.0), 1, {first})) == [second]


def test_scores_are_log_probabilities_before_any_of_it() -> None:
    made, hidden_N_D = model(), hidden(1)
    right = made.logits(hidden_N_D)[0].double().log_softmax(-1)
    sampling = Sampling(1, temperature=3.0, top_k=50, repetition_penalty=2.0, seed=4, logprobs=2)
    choice = Sampler(made).choose(hidden_N_D, [Wish(sampling, 3, {1, 2})])[0]
    assert choice.score is not None
    assert choice.score.token_id == choice.token
    assert choice.score.logprob == pytest.approx(right[choice.token].item(), abs=1e-6)
    assert [token for token, _ in choice.score.top] == right.topk(2).indices.tolist()
    assert scores_of(made.logits(hidden_N_D), [7], 0)[0].top == ()


def test_numbers_that_went_astray_still_choose_something() -> None:
    made = model()
    for sampling in (Sampling(1), Sampling(1, temperature=1.0), Sampling(1, temperature=1.0, top_p=0.9)):
        (token,) = tokens(made, torch.full((1, 32), torch.nan), Wish(sampling, 1))
        assert 0 <= token < VOCABULARY
