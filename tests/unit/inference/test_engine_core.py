"""The engine without its process: pictures in slices, features that are kept, passes that fail."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch

from veneer_inference.engine import messages
from veneer_inference.engine.core import _TOWER_SLICE, EngineCore, Loaded, TurnedAway
from veneer_inference.engine.drafts import Continuations
from veneer_inference.engine.pace import StepPace
from veneer_inference.engine.request import Request
from veneer_inference.engine.scheduler import Limits, Sequence
from veneer_inference.engine.sight import FeatureCache, Picture, Sight, feature_key, touches_tower
from veneer_inference.ports import EngineError, EnginePrompt, Sampling
from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.vision import Grid, VisualFeatures
from veneer_vlm.weights import random_model

IMAGE, PATCH_VALUES = 60, 96
CONFIG = {
    "model_type": "qwen3_vl",
    "image_token_id": IMAGE,
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_scaling": {"mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [1],
    },
}
OF_PATCH = 2 * 16 * (2 * 16 + 16)  # multiplications of a patch's way through a layer's linears
GRIDS: tuple[Grid, ...] = ((1, 4, 4), (1, 2, 6), (1, 2, 2))


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.set_num_threads(1)
    return random_model(ModelConfig.from_dict(CONFIG), seed=1)


def adapter(model: VisionLanguageModel, seed: int, *targets: str) -> Adapter:
    made = Adapter.new(model.config, AdapterConfig(r=2, target_modules=targets), seed)
    for pair in made.pairs.values():
        pair.b_O_R.normal_(generator=torch.Generator().manual_seed(seed))
    return made


def picture(request: int, grid: Grid, worn: Adapter | None = None, digest: str = "") -> Picture:
    patches = torch.randn(math.prod(grid), PATCH_VALUES, generator=torch.Generator().manual_seed(request))
    return Picture(request, 0, grid, patches, worn, digest, feature_key("t", f"{request}", grid, digest))


def assert_same(found: VisualFeatures, right: VisualFeatures) -> None:
    torch.testing.assert_close(found.tokens_M_D, right.tokens_M_D)
    torch.testing.assert_close(found.deepstack_M_D, right.deepstack_M_D)


@torch.inference_mode()
def test_slices_see_what_a_whole_pass_sees(model: VisionLanguageModel) -> None:
    sight = Sight(model, slice_multiplications=20 * OF_PATCH, cache_bytes=1 << 20)
    pictures = [picture(number, grid) for number, grid in enumerate(GRIDS)]
    for each in pictures:
        assert sight.show(each) is None
    seen = []
    slices = 0
    while sight.busy:
        seen += sight.advance()
        slices += 1
    assert slices >= 3  # the first picture alone took a step a layer
    assert [each for each, _ in seen] == pictures
    for each, features in seen:
        right = model.see(each.patches_P_X, [each.grid])
        assert_same(features, right)
        kept = sight.show(each)
        assert kept is not None
        assert_same(kept, right)
    assert not sight.busy


@torch.inference_mode()
def test_pictures_in_one_pass_wear_their_own_adapters(model: VisionLanguageModel) -> None:
    worn = {"a": adapter(model, 1, "attn.qkv", "linear_fc2"), "b": adapter(model, 2, "merger.linear_fc1")}
    sight = Sight(model, slice_multiplications=1000 * OF_PATCH, cache_bytes=0)
    digests = ["a", "", "b", "a"]
    pictures = [picture(n, GRIDS[n % 3], worn.get(digest), digest) for n, digest in enumerate(digests)]
    for each in pictures:
        sight.show(each)
    seen = sight.advance()
    assert sorted(each.request for each, _ in seen) == [0, 1, 2, 3]
    for each, features in seen:
        lora = AdapterBatch.uniform(each.adapter, len(each.patches_P_X))
        assert_same(features, model.see(each.patches_P_X, [each.grid], lora))
    assert sight.show(pictures[0]) is None  # a cache of no bytes keeps nothing


def test_which_adapters_touch_the_tower(model: VisionLanguageModel) -> None:
    assert touches_tower(adapter(model, 1, "merger.linear_fc1"))
    assert touches_tower(adapter(model, 1, "attn.qkv", "q_proj"))
    assert not touches_tower(adapter(model, 1, "q_proj", "down_proj"))


def test_pictures_of_an_ended_request_are_not_seen(model: VisionLanguageModel) -> None:
    sight = Sight(model, 1000 * OF_PATCH, 0)
    for number in (1, 2):
        sight.show(picture(number, GRIDS[0]))
    sight.forget(1)
    assert [each.request for each, _ in sight.advance()] == [2]
    assert not sight.busy


def test_a_request_that_is_cancelled_takes_its_pictures_along(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_TOWER_SLICE, "cpu", OF_PATCH)  # one picture at a time
    monkeypatch.setattr(StepPace, "room_s", 0.0)
    core = make_core(model)
    for key in (1, 2):
        ask(core, key, prompt(5, GRIDS[:1]))
    core.step()
    core.handle(messages.Cancel(2))  # its picture waits for the first one's
    started: list[object] = []
    monkeypatch.setattr("veneer_vlm.vision.VisionTower.start", lambda *_: started.append(1))
    assert run(core) == {1: "length"}
    assert not core._sight.busy
    assert not started


def test_what_is_kept_of_a_batch_does_not_keep_the_batch() -> None:
    cache, batch = FeatureCache(1 << 20), VisualFeatures(torch.zeros(100, 4), (torch.zeros(100, 4),))
    key = feature_key("t", "a", GRIDS[0])
    cache.put(key, batch[:2])
    kept = cache.get(key)
    assert kept is not None
    sizes = [each.untyped_storage().nbytes() for each in (kept.tokens_M_D, *kept.deepstack_M_D)]
    assert sum(sizes) == cache.size_bytes == 2 * 2 * 4 * 4


def test_kept_features_stay_within_their_bound() -> None:
    cache = FeatureCache(3000)

    def features(values: int) -> VisualFeatures:
        return VisualFeatures(torch.zeros(values, 1), ())

    keys = [feature_key("t", str(number), GRIDS[0]) for number in range(4)]
    for key in keys[:3]:
        cache.put(key, features(250))
    assert cache.get(keys[0]) is not None
    cache.put(keys[3], features(250))
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    cache.put(keys[1], features(751))
    assert cache.get(keys[1]) is None
    assert cache.size_bytes == 3000
    assert cache.get(None) is None


def make_core(model: VisionLanguageModel, loads: list[str] | None = None) -> EngineCore:
    asked = [] if loads is None else loads
    return EngineCore(model, Limits(256, 32), 2, 1 << 20, 1 << 20, lambda digest, directory: asked.append(digest))


def prompt(tokens: int = 5, grids: tuple[Grid, ...] = ()) -> EnginePrompt:
    ids_T = np.concatenate([np.arange(tokens), *(np.full(math.prod(grid) // 4, IMAGE) for grid in grids)])
    return EnginePrompt(
        ids_T,
        np.tile(np.arange(len(ids_T)), (3, 1)),
        0,
        np.array(grids, np.int64).reshape(-1, 3),
        np.zeros((sum(math.prod(grid) for grid in grids), PATCH_VALUES), np.float32),
    )


def ask(core: EngineCore, key: int, asked: EnginePrompt, worn: str = "") -> None:
    core.handle(messages.Generate(key, "t", worn, messages.Prompt.of(asked), Sampling(3)))


def run(core: EngineCore) -> dict[int, str]:
    """How each request ended."""
    ends = {}
    for _ in range(100):
        report = core.step()
        ends |= {failure.key: failure.reason for failure in report.failures}
        ends |= {each.key: each.step.finish for each in report.progress if each.step.finish}
        if core.idle:
            return ends
    raise AssertionError("requests that never end")


def broken(*_: object) -> None:
    raise RuntimeError("no memory")


def test_a_pass_that_fails_takes_its_own_requests_alone(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(model)
    ask(core, 1, prompt())
    with monkeypatch.context() as patch:
        patch.setattr("veneer_inference.engine.runner.PagedAttention.__call__", broken)
        report = core.step()
    assert [(failure.key, failure.reason) for failure in report.failures] == [(1, "ENGINE_GONE")]
    assert report.stats.kv_tokens_in_use == 0
    ask(core, 2, prompt())
    assert run(core) == {2: "length"}


def test_a_tower_that_fails_takes_its_pictures_requests_alone(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(model)
    ask(core, 1, prompt(5, GRIDS[:2]))
    ask(core, 2, prompt())
    monkeypatch.setattr("veneer_vlm.vision.VisionTower.start", broken)
    assert run(core) == {1: "ENGINE_GONE", 2: "length"}
    assert core.idle


def test_an_adapter_is_loaded_once_and_a_failure_reaches_all_who_wait(model: VisionLanguageModel) -> None:
    loads: list[str] = []
    core = make_core(model, loads)
    for key in (1, 2):
        core.handle(messages.Load(key, "a", "x"))
    assert loads == ["a"]
    core.handle(Loaded("a", error=EngineError("ADAPTER_INVALID", ["it is wrong"])))
    assert [(each.key, each.problems) for each in core.step().failures] == [
        (1, ("it is wrong",)),
        (2, ("it is wrong",)),
    ]
    core.handle(messages.Load(3, "a", "x"))
    assert loads == ["a", "a"]
    core.handle(Loaded("a", adapter(model, 1, "q_proj")))
    report = core.step()
    assert [each.key for each in report.done] == [3]
    assert report.adapters is not None
    assert [state.digest for state in report.adapters] == ["a"]
    ask(core, 4, prompt(), "a")
    ask(core, 5, prompt(), "b")
    assert run(core) == {4: "length", 5: "ADAPTER_NOT_LOADED"}


def test_a_request_that_the_queue_refuses_holds_no_adapter(model: VisionLanguageModel) -> None:
    core = EngineCore(model, Limits(256, 32, waiting=2), 2, 1 << 20, 1 << 20, lambda *_: None)
    core.handle(messages.Load(1, "a", "x"))
    core.handle(Loaded("a", adapter(model, 1, "q_proj")))
    for key in (2, 3):  # of one tenant, who may have one request waiting
        ask(core, key, prompt(), "a")
    assert run(core) == {2: "length", 3: "QUEUE_FULL"}
    core.handle(messages.Unload(4, "a"))
    assert core.step().adapters == ()


def test_what_an_answer_has_said_is_penalised_in_it(model: VisionLanguageModel) -> None:
    core = make_core(model)
    core.handle(messages.Generate(1, "t", "", messages.Prompt.of(prompt()), Sampling(12, repetition_penalty=1e6)))
    said: list[int] = []
    while not core.idle:
        said += [token for each in core.step().progress for token in each.step.token_ids]
    assert len({*said, *range(5)}) == 12 + 5


def test_no_picture_is_guessed(model: VisionLanguageModel) -> None:
    """An answer has none, whatever followed the same tokens before."""
    request = Request.of(Sequence(1, "t", "", 5, 10), prompt(), Sampling(10), 0, IMAGE)
    request.speculate()
    others = Continuations()
    others.add([2, 3, 4, 7, IMAGE, 8])
    request.guess(8, others, IMAGE)
    assert (request.sequence.draft, request.ids_T[5]) == (1, 7)


def test_what_is_refused_beforehand_is_told_with_its_time(model: VisionLanguageModel) -> None:
    core = make_core(model)
    core.handle(TurnedAway(7, EngineError("QUEUE_FULL", ["no room"], 2.0)))
    (failure,) = core.step().failures
    assert (failure.key, failure.reason, failure.retry_s) == (7, "QUEUE_FULL", 2.0)


def test_prompts_give_way_while_answers_are_under_way(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(model)
    ask(core, 1, prompt())
    core.step()
    monkeypatch.setattr(core._step_pace, "tokens", lambda most, _seen_s: min(most, 16))
    core.handle(messages.Generate(2, "t", "", messages.Prompt.of(prompt(60)), Sampling(3)))
    before = core.step().stats.counters["computed_tokens"]
    assert core.step().stats.counters["computed_tokens"] - before == 1 + 16


def test_an_adapter_that_was_dropped_leaves_nothing_behind(model: VisionLanguageModel) -> None:
    core = make_core(model)
    worn = adapter(model, 1, "q_proj")
    core.handle(messages.Load(1, "a", "x"))
    core.handle(Loaded("a", worn))
    left = weakref.ref(worn.pairs["model.language_model.layers.0.self_attn.q_proj"].a_R_I)
    ask(core, 2, prompt(), "a")
    ask(core, 3, prompt())  # a batch of several, for which factors are packed
    assert run(core) == {2: "length", 3: "length"}
    core.handle(messages.Unload(4, "a"))
    del worn
    gc.collect()
    assert left() is None


def test_pixels_are_let_go_once_the_tower_has_them(model: VisionLanguageModel) -> None:
    core = make_core(model)
    ask(core, 1, prompt(5, GRIDS[:1]))
    core.step()
    assert core._requests[1].prompt.patches_N_P.size == 0
    assert run(core) == {1: "length"}


@pytest.fixture
def slicing(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    """A long answer under way, and a picture of many slices for request 2, of which a step has room for one."""
    monkeypatch.setitem(_TOWER_SLICE, "cpu", 50 * OF_PATCH)
    monkeypatch.setattr(StepPace, "room_s", 0.0)
    core = EngineCore(model, Limits(256, 64), 2, 1 << 20, 1 << 20, lambda *_: None, speculation=False)
    core.handle(messages.Generate(1, "t", "", messages.Prompt.of(prompt()), Sampling(240)))
    core.step()
    ask(core, 2, prompt(5, ((1, 20, 20),)))
    return core


def test_a_large_picture_and_a_prompt_take_turns_beside_an_answer(
    slicing: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slicing._step_pace.computed(1.0, 0, 8)  # tokens of prompts have a pace
    ask(slicing, 3, prompt(60))
    slices: list[int] = []
    advance = slicing._sight.advance
    monkeypatch.setattr(slicing._sight, "advance", lambda: slices.append(1) or advance())
    turns = []
    for _ in range(12):
        slices.clear()
        before = slicing._counters["computed_tokens"]
        slicing.step()
        turns.append((len(slices), slicing._counters["computed_tokens"] - before))
    assert turns == [(1, 1), (0, 1 + 8)] * 6  # one token of the answer in each


def test_a_large_picture_leaves_no_step_without_a_token(slicing: EngineCore) -> None:
    """Each step takes a slice of the tower and a token of the answer under way, however many slices there are."""
    steps, answered = 0, []
    while 2 not in (keys := [each.key for each in slicing.step().progress]):
        answered.append(keys)
        steps += 1
    assert steps > 20
    assert answered == [[1]] * steps
