# ruff: noqa: ANN401  # a stand-in for a library without types here
"""vLLM behind the port, with a stand-in for vLLM: what is asked of it, and what becomes of what it says."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from veneer_base.unfold import base_directory
from veneer_digests import adapter_digest, contract_digest, model_digest, tensor_digests
from veneer_inference.base import engine_prompt
from veneer_inference.engine.vllm_engine import Library, VllmEngine, collapsed, pictures
from veneer_inference.ports import EngineError, EnginePrompt, Sampling
from veneer_processing import Conversation, Message, Picture, Processor, Text
from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter, AdapterConfig
from veneer_vlm.peft_folder import write


class Kind(Enum):
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class Lora:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Vllm:
    """`AsyncLLMEngine`, as its documentation says; answers 100, 101, … and then a stop token."""

    arguments: Any = None
    errored: bool = False
    loras: dict[int, Lora] = field(default_factory=dict)
    asked: list[tuple[dict[str, Any], Any, Lora | None]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    pace: asyncio.Event = field(default_factory=asyncio.Event)
    raises: Exception | None = None
    finish: str = "stop"
    refuses_loras: bool = False
    shut_down: bool = False
    model_config: Any = field(default_factory=lambda: SimpleNamespace(max_model_len=4096))
    vllm_config: Any = field(
        default_factory=lambda: SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=16))
    )

    def from_engine_args(self, arguments: Any) -> "Vllm":
        if self.raises:
            raise self.raises
        self.arguments = arguments
        return self

    async def add_lora(self, request: Lora) -> bool:
        await asyncio.sleep(0)
        self.loras[request.lora_int_id] = request
        return not self.refuses_loras

    async def remove_lora(self, number: int) -> bool:
        return self.loras.pop(number, None) is not None

    async def generate(
        self, prompt: dict[str, Any], params: Any, request_id: str, *, lora_request: Lora | None = None
    ) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, lora_request))
        if self.raises:
            raise self.raises
        ended = False
        try:
            if params.output_kind is Kind.FINAL_ONLY:
                yield self._scored(prompt, params)
                ended = True
                return
            for index in range(params.max_tokens):
                if index:
                    await self.pace.wait()
                last = index + 1 == params.max_tokens
                found = None
                if params.logprobs is not None:
                    found = [{100 + index: _logprob(-0.5, 1), 7: _logprob(-1.5, 2), 8: _logprob(-2.5, 3)}]
                answer = SimpleNamespace(
                    token_ids=[100 + index], logprobs=found, finish_reason=self.finish if last else None
                )  # fmt: skip
                ended = last
                yield SimpleNamespace(outputs=[answer], num_cached_tokens=3, prompt_logprobs=None, finished=last)
        finally:
            if not ended:
                self.aborted.append(request_id)

    def _scored(self, prompt: dict[str, Any], params: Any) -> Any:
        ids = prompt["prompt_token_ids"]
        found = [None, *({token: _logprob(-0.25, 4), 7: _logprob(-0.1, 1)} for token in ids[1:])]
        return SimpleNamespace(outputs=[], num_cached_tokens=0, prompt_logprobs=found, finished=True)

    def shutdown(self) -> None:
        self.shut_down = True


def _logprob(value: float, rank: int) -> Any:
    return SimpleNamespace(logprob=value, rank=rank)


@pytest.fixture(scope="module")
def base() -> Path:
    return base_directory()


@pytest.fixture
def vllm() -> Vllm:
    fake = Vllm()
    fake.pace.set()
    return fake


@pytest.fixture
def library(vllm: Vllm) -> Library:
    return Library(SimpleNamespace, vllm, SimpleNamespace, Kind, SimpleNamespace, Lora)


@pytest.fixture
async def engine(base: Path, library: Library) -> VllmEngine:
    return await VllmEngine.start(
        base, dtype="bfloat16", slots=4, max_rank=16, max_requests=2, library=library
    )  # fmt: skip


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> tuple[str, Path]:
    return saved(base, tmp_path / "adapter", ("q_proj", "v_proj"))


def saved(base: Path, directory: Path, targets: tuple[str, ...], rank: int = 4) -> tuple[str, Path]:
    config = AdapterConfig(r=rank, lora_alpha=8, target_modules=targets)
    write(Adapter.new(ModelConfig.from_directory(base), config, seed=1), directory)
    contract = {"model_digest": model_digest(base)}
    (directory / "processing_contract.json").write_text(json.dumps(contract))
    settings = json.loads((directory / "adapter_config.json").read_text())
    tensors = tensor_digests(directory / "adapter_model.safetensors")
    return adapter_digest(tensors, settings, contract_digest(contract)), directory


def prompt(tokens: int = 5, supervised: int = 0) -> EnginePrompt:
    ids_T = np.arange(10, 10 + tokens)
    marks = np.arange(tokens) >= tokens - supervised
    return EnginePrompt(
        ids_T, np.tile(np.arange(tokens), (3, 1)), 0, np.zeros((0, 3), np.int64), np.zeros((0, 0), np.float32), (),
        marks if supervised else None,
    )  # fmt: skip


async def test_it_starts_with_lora_and_says_what_it_is(engine: VllmEngine, vllm: Vllm, base: Path) -> None:
    arguments = vars(vllm.arguments)
    assert (arguments["enable_lora"], arguments["max_loras"], arguments["max_lora_rank"]) == (True, 4, 16)
    assert arguments["trust_remote_code"] is False
    assert engine.info.model_digest == model_digest(base)
    assert (engine.info.context_length, engine.info.kv_capacity_tokens) == (4096, 1600)


async def test_an_answer_is_drawn_as_it_was_asked_for(engine: VllmEngine, vllm: Vllm) -> None:
    wish = Sampling(3, 0.7, 0.9, 5, 1.1, 11, 2, (2, 3), '{"type": "object"}')
    steps = [step async for step in engine.generate("acme", "", prompt(), wish)]
    assert [step.token_ids for step in steps] == [(100,), (101,), (102,)]
    assert [step.finish for step in steps] == ["", "", "stop"]
    assert steps[0].cached_tokens == 3
    assert steps[1].scores[0].logprob == -0.5
    assert steps[1].scores[0].top == ((101, -0.5), (7, -1.5))
    asked, params, lora = vllm.asked[0]
    assert asked == {"prompt_token_ids": [10, 11, 12, 13, 14], "cache_salt": "acme"}
    assert lora is None
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (3, 0.7, 0.9, 5)
    assert (params.repetition_penalty, params.seed, params.stop_token_ids) == (1.1, 11, [2, 3])
    assert params.structured_outputs.json == '{"type": "object"}'
    assert engine.stats().running == engine.stats().waiting == 0


async def test_an_adapter_is_checked_loaded_once_used_and_dropped(
    engine: VllmEngine, vllm: Vllm, adapter: tuple[str, Path]
) -> None:
    digest, directory = adapter
    sizes = await asyncio.gather(*(engine.load_adapter(digest, directory) for _ in range(3)))
    assert len(set(sizes)) == 1
    assert [(each.lora_name, each.lora_path) for each in vllm.loras.values()] == [(digest, str(directory))]
    vllm.pace.clear()
    answer = engine.generate("acme", digest, prompt(), Sampling(2))
    await anext(answer)
    assert vllm.asked[0][2] is vllm.loras[1]
    assert [(state.digest, state.active_requests) for state in engine.stats().adapters] == [(digest, 1)]
    await engine.unload_adapter(digest)
    assert vllm.loras  # in use
    with pytest.raises(EngineError) as refused:
        await anext(engine.generate("acme", digest, prompt(), Sampling(2)))
    assert refused.value.reason == "ADAPTER_NOT_LOADED"
    vllm.pace.set()
    assert [step.token_ids async for step in answer] == [(101,)]
    assert not vllm.loras
    assert not engine.stats().adapters


async def test_what_cannot_be_served_is_refused(
    engine: VllmEngine, vllm: Vllm, base: Path, adapter: tuple[str, Path], tmp_path: Path
) -> None:
    async def problem(digest: str, directory: Path) -> str:
        with pytest.raises(EngineError) as refused:
            await engine.load_adapter(digest, directory)
        assert refused.value.reason == "ADAPTER_INVALID"
        return str(refused.value)

    assert "hashes to" in await problem("ab" * 32, adapter[1])
    assert "at most 16" in await problem(*saved(base, tmp_path / "wide", ("q_proj",), rank=32))
    assert "vision tower" in await problem(*saved(base, tmp_path / "tower", ("attn.qkv",)))
    assert not vllm.loras
    vllm.refuses_loras = True
    assert "refuses" in await problem(*adapter)
    assert not engine.stats().adapters


async def test_a_reader_that_leaves_aborts(engine: VllmEngine, vllm: Vllm) -> None:
    vllm.pace.clear()
    answer = engine.generate("acme", "", prompt(), Sampling(5))
    await anext(answer)
    assert engine.stats().running == 1
    await answer.aclose()  # type: ignore[attr-defined]
    assert len(vllm.aborted) == 1
    assert engine.stats().running == 0
    assert engine.stats().counters["cancelled"] == 1


async def test_requests_beyond_the_bound_are_refused_with_a_time(engine: VllmEngine, vllm: Vllm) -> None:
    vllm.pace.clear()
    answers = [engine.generate("acme", "", prompt(), Sampling(2)) for _ in range(2)]
    for answer in answers:
        await anext(answer)
    with pytest.raises(EngineError) as refused:
        await anext(engine.generate("acme", "", prompt(), Sampling(2)))
    assert refused.value.reason == "QUEUE_FULL"
    assert refused.value.retry_s
    for answer in answers:
        await answer.aclose()  # type: ignore[attr-defined]
    vllm.pace.set()
    assert [step async for step in engine.generate("acme", "", prompt(), Sampling(1))]


async def test_a_score_is_of_the_supervised_tokens(engine: VllmEngine, vllm: Vllm) -> None:
    scores = await engine.score("acme", "", prompt(5, supervised=2), 1)
    assert [(score.token_id, score.logprob, score.top) for score in scores] == [
        (13, -0.25, ((7, -0.1),)), (14, -0.25, ((7, -0.1),)),
    ]  # fmt: skip
    assert vllm.asked[0][1].prompt_logprobs == 1


@pytest.mark.parametrize(
    ("raised", "reason"), [(ValueError("too long"), "REQUEST_INVALID"), (RuntimeError("dead"), "ENGINE_GONE")]
)
async def test_what_vllm_raises_is_told(engine: VllmEngine, vllm: Vllm, raised: Exception, reason: str) -> None:
    vllm.raises = raised
    with pytest.raises(EngineError) as refused:
        await anext(engine.generate("acme", "", prompt(), Sampling(2)))
    assert refused.value.reason == reason
    assert engine.stats().running == engine.stats().waiting == 0


async def test_an_answer_that_vllm_breaks_off_is_no_answer(engine: VllmEngine, vllm: Vllm) -> None:
    vllm.finish = "abort"
    with pytest.raises(EngineError) as refused:
        [step async for step in engine.generate("acme", "", prompt(), Sampling(1))]
    assert refused.value.reason == "ENGINE_GONE"


async def test_a_dead_engine_is_gone_and_a_closed_one_too(engine: VllmEngine, vllm: Vllm) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.gone(), 0.05)
    vllm.errored = True
    await asyncio.wait_for(engine.gone(), 5)
    vllm.errored = False
    await engine.close()
    assert vllm.shut_down
    await asyncio.wait_for(engine.gone(), 5)


async def test_without_vllm_or_with_a_base_that_it_refuses_nothing_starts(
    base: Path, vllm: Vllm, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    choices: dict[str, Any] = {"dtype": "bfloat16", "slots": 4, "max_rank": 16, "max_requests": 2}
    with pytest.raises(EngineError, match="pip install vllm"):
        await VllmEngine.start(base, **choices)
    vllm.raises = RuntimeError("no GPU")
    with pytest.raises(EngineError, match="no GPU"):
        await VllmEngine.start(base, library=library, **choices)


async def test_pictures_go_as_they_were_resized(engine: VllmEngine, vllm: Vllm, base: Path) -> None:
    processor = Processor.load(base, "ab" * 32)
    random = np.random.default_rng(0)
    shown = [
        Picture(f"{number}a" * 32, width, height, random.integers(0, 256, (height, width, 3), np.uint8))
        for number, (height, width) in enumerate(((64, 96), (128, 64)))
    ]
    question = Conversation((Message("user", (shown[0], Text("and"), shown[1], Text("what?"))),))
    encoded = processor.encode_prompt(question)
    asked = engine_prompt(encoded, ("aa", "bb"))
    [step async for step in engine.generate("acme", "", asked, Sampling(1))]
    sent = vllm.asked[0][0]
    for picture, image in zip(shown, sent["multi_modal_data"]["image"], strict=True):
        assert (np.asarray(image) == processor.pixels.resize(picture)).all()
    image_token = ModelConfig.from_directory(base).image_token_id
    assert sent["prompt_token_ids"].count(image_token) == 2
    others = [token for token in asked.ids_T.tolist() if token != image_token]
    assert [token for token in sent["prompt_token_ids"] if token != image_token] == others
    names = sent["multi_modal_uuids"]["image"]
    assert len(set(names)) == 2
    assert all(name.startswith("acme:") for name in names)  # no tenant meets another's pictures in a cache
    assert sent["mm_processor_kwargs"]["size"]["shortest_edge"] == 1


def test_a_run_of_image_tokens_becomes_one_a_picture() -> None:
    ids_T = np.array([1, 9, 9, 9, 9, 9, 2, 9])
    assert collapsed(ids_T, 9, [3, 2, 1]) == [1, 9, 9, 2, 9]
    assert pictures(prompt(), 16, 2) == []
