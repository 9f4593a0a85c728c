"""Adapters that come, go and are wrong, while others answer."""

# ruff: noqa: ANN401  # fixtures of the conftest next to this

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer_inference.ports import EngineError, Sampling

pytestmark = pytest.mark.asyncio(loop_scope="module")
GREEDY = Sampling(12)
FIRST_KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path)

    return apply


def settings(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def truncate(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "a value not finite": (tensors(lambda held: held[FIRST_KEY].fill_(torch.inf)), "not finite"),
    "a tensor missing": (tensors(lambda held: held.pop(FIRST_KEY)), "is missing"),
    "a tensor unknown": (tensors(lambda held: held.update(strange=torch.ones(1))), "tensor strange is unknown"),
    "a wrong shape": (tensors(lambda held: held.update({FIRST_KEY: torch.ones(3, 64)})), "has shape (3, 64)"),
    "another rank": (settings("adapter_config.json", r=5), "is needed"),
    "another scale": (settings("adapter_config.json", lora_alpha=1), "it hashes to"),
    "one bit": (tensors(lambda held: held[FIRST_KEY][0, 0].add_(1)), "it hashes to"),
    "another base": (settings("processing_contract.json", model_digest="cd" * 32), "it was trained on base"),
    "no contract": (lambda directory: (directory / "processing_contract.json").unlink(), "cannot be read"),
    "a file cut off": (truncate, "cannot be read"),
    "no folder": (shutil.rmtree, "cannot be read"),
    "no JSON": (lambda directory: (directory / "adapter_config.json").write_text("[" * 100_000), "cannot be read"),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_adapter_is_refused_and_the_engine_lives(
    kit: Any, engine: Any, tmp_path: Path, wrong: str
) -> None:
    change, problem = WRONG[wrong]
    saved = kit.adapters[0]
    directory = tmp_path / "adapter"
    shutil.copytree(saved.directory, directory)
    change(directory)
    digest = "ab" * 32 if wrong != "another base" else kit.digest(directory)
    error = await kit.refusal(engine.load_adapter(digest, directory))
    assert error.reason == "ADAPTER_INVALID"
    assert any(problem in each for each in error.problems), error.problems
    prompt = kit.prompt(1)
    assert (await kit.refusal(kit.tokens(engine, prompt, type(saved)(digest, directory, None), GREEDY))).reason == (
        "ADAPTER_NOT_LOADED"
    )
    assert await kit.tokens(engine, prompt, saved, GREEDY) == kit.answer(prompt, saved, 12)


async def test_every_problem_is_named_at_once(kit: Any, engine: Any, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    shutil.copytree(kit.adapters[0].directory, directory)
    tensors(lambda held: held.update(strange=torch.ones(1)) or held[FIRST_KEY].fill_(torch.nan))(directory)
    (directory / "processing_contract.json").unlink()
    error = await kit.refusal(engine.load_adapter("ab" * 32, directory))
    assert len(error.problems) == 3
    too_large = kit.adapter(9, rank=128)
    error = await kit.refusal(engine.load_adapter(too_large.digest, too_large.directory))
    assert error.problems == ("r is 128, at most 64 is served",)


async def test_loads_at_once_share_one(kit: Any, engine: Any) -> None:
    saved = kit.adapter(20)
    before = engine.stats().counters["adapters_loaded"]
    sizes = await asyncio.gather(*(engine.load_adapter(saved.digest, saved.directory) for _ in range(5)))
    assert sizes == [sum(tensor.nbytes for _, tensor in saved.adapter.tensors())] * 5
    assert await engine.load_adapter(saved.digest, saved.directory) == sizes[0]
    assert engine.stats().counters["adapters_loaded"] - before == 1
    await engine.unload_adapter(saved.digest)


async def test_an_adapter_in_use_goes_when_its_last_answer_has_ended(kit: Any, engine: Any) -> None:
    saved = kit.adapter(21)
    prompt = kit.prompt(1)
    await engine.load_adapter(saved.digest, saved.directory)
    steps = engine.generate("t", saved.digest, prompt, Sampling(40))
    tokens = list((await anext(steps)).token_ids)
    await engine.unload_adapter(saved.digest)
    assert (await kit.refusal(kit.tokens(engine, prompt, saved, GREEDY))).reason == "ADAPTER_NOT_LOADED"
    async for step in steps:
        tokens += step.token_ids
    assert tokens == kit.answer(prompt, saved, 40)
    await kit.until(lambda: saved.digest not in [state.digest for state in engine.stats().adapters])


async def test_hot_swaps_under_load_break_no_answer(kit: Any, engine: Any) -> None:
    """8 streams, and adapters that are loaded and unloaded all the while."""
    versions = [kit.adapter(30 + number, rank=2 + number) for number in range(4)]
    right = {saved.digest: kit.answer(kit.prompt(1), saved, 12) for saved in versions}
    assert len({tuple(answer) for answer in right.values()}) == len(versions)
    wrong: list[Any] = []
    swapping = True
    answered = 0

    async def ask(number: int) -> None:
        nonlocal answered
        while swapping:
            saved = versions[(number + answered) % len(versions)]
            try:
                tokens = await kit.tokens(engine, kit.prompt(1), saved, GREEDY, tenant=f"t{number % 2}")
            except EngineError as error:
                if error.reason != "ADAPTER_NOT_LOADED":
                    wrong.append(error)
                await engine.load_adapter(saved.digest, saved.directory)
                continue
            answered += 1
            if tokens != right[saved.digest]:
                wrong.append((saved.digest, tokens))

    asking = [asyncio.create_task(ask(number)) for number in range(8)]
    for swap in range(100):
        saved = versions[swap % len(versions)]
        await engine.unload_adapter(saved.digest)
        await engine.load_adapter(saved.digest, saved.directory)
    swapping = False
    await asyncio.gather(*asking)
    assert not wrong
    assert answered > 8
    for saved in versions:
        await engine.unload_adapter(saved.digest)
    await kit.until(lambda: engine.stats().running == 0)
    assert all(state.active_requests == 0 for state in engine.stats().adapters)
    assert len(engine.stats().adapters) == len(kit.adapters)


async def test_a_hundred_loads_leave_nothing_behind(kit: Any, engine: Any) -> None:
    saved = kit.adapter(40, rank=64, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    process = psutil.Process(engine.pid)

    async def cycle() -> None:
        await engine.load_adapter(saved.digest, saved.directory)
        await asyncio.gather(*(kit.tokens(engine, kit.prompt(1), each, Sampling(2)) for each in (saved, None)))
        await engine.unload_adapter(saved.digest)

    for _ in range(20):
        await cycle()
    before = process.memory_info().rss
    for _ in range(100):
        await cycle()
    grown = process.memory_info().rss - before
    size = sum(tensor.nbytes for _, tensor in saved.adapter.tensors())
    assert grown < 20 * size
    assert [state.active_requests for state in engine.stats().adapters] == [0] * len(kit.adapters)
    assert engine.stats().kv_tokens_in_use == 0
