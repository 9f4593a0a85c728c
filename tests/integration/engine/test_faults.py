"""Readers that leave, queues that are full, prompts that are wrong, an engine that dies."""

# ruff: noqa: ANN401  # fixtures of the conftest next to this

import asyncio
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from veneer_inference.engine.client import EngineProcess
from veneer_inference.ports import EngineError, Sampling

pytestmark = pytest.mark.asyncio(loop_scope="module")
GREEDY = Sampling(12)


async def test_a_closed_answer_frees_its_memory(kit: Any, engine: Any) -> None:
    steps = [engine.generate("t", saved.digest, kit.prompt(1), Sampling(400)) for saved in kit.adapters]
    await asyncio.gather(*(anext(each) for each in steps))
    assert engine.stats().kv_tokens_in_use == 3 * 416
    assert [state.active_requests for state in engine.stats().adapters] == [1, 1, 1]
    before = engine.stats().steps
    await steps[0].aclose()
    await kit.until(lambda: engine.stats().running == 2)
    assert engine.stats().kv_tokens_in_use == 2 * 416
    for each in steps[1:]:
        await each.aclose()
    await kit.until(lambda: engine.stats().running == 0)
    assert engine.stats().kv_tokens_in_use == 0
    assert engine.stats().steps - before < 350  # not because the answers had come to their end
    assert [state.active_requests for state in engine.stats().adapters] == [0, 0, 0]


async def test_a_cancelled_reader_frees_its_memory(kit: Any, engine: Any) -> None:
    task = asyncio.create_task(kit.tokens(engine, kit.prompt(1), None, Sampling(400)))
    await kit.until(lambda: engine.stats().running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    scoring = asyncio.create_task(engine.score("t", "", kit.prompt(1, 400, supervised=300), 0))
    await asyncio.sleep(0)
    scoring.cancel()
    await kit.until(lambda: engine.stats().running == 0)
    assert engine.stats().kv_tokens_in_use == 0


async def test_a_reader_that_falls_behind_is_let_go(kit: Any) -> None:
    engine = await EngineProcess.start(kit.base, 1, reader_steps=8)
    steps = engine.generate("t", "", kit.prompt(1), Sampling(400))
    await anext(steps)
    await kit.until(lambda: engine.stats().running == 0)  # nobody has read a step since
    assert engine.stats().counters["cancelled"] == 1
    with pytest.raises(EngineError) as caught:
        async for _ in steps:
            pass
    assert caught.value.reason == "READER_TOO_SLOW"
    assert await kit.tokens(engine, kit.prompt(1), None, Sampling(5)) == kit.answer(kit.prompt(1), None, 5)
    await engine.close()
    assert await engine._process.ended() == 0  # an engine without work sees the end of its socket too


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ids_T": np.array([1, 2, 256, 3, 4, 5])}, "vocabulary of 256"),
        ({"ids_T": np.array([1, -1, 2, 3, 4, 5])}, "vocabulary of 256"),
        ({"ids_T": np.array([1, 250, 2, 3, 4, 5])}, "1 image tokens, the grids make 0"),
        ({"ids_T": np.array([], np.int64)}, "no tokens"),
        ({"positions_3_T": np.zeros((3, 5), np.int64)}, "positions have shape"),
        ({"positions_3_T": np.zeros((2, 5), np.int64)}, "wrong shape"),
        ({"grids_n_3": np.array([[1, 2, 2]])}, "the grids need"),
        ({"grids_n_3": np.array([[1, 3, 2]])}, "multiples of 2"),
        ({"grids_n_3": np.array([[2, 2, 2]])}, "one frame"),
        ({"picture_digests": ("ab",)}, "picture digests"),
    ],
)
async def test_a_prompt_that_cannot_be_read_is_refused(
    kit: Any, engine: Any, changes: dict[str, Any], problem: str
) -> None:
    prompt = dataclasses.replace(kit.prompt(1), **changes)
    error = await kit.refusal(kit.tokens(engine, prompt, None, GREEDY))
    assert error.reason == "REQUEST_INVALID"
    assert problem in str(error)
    assert await kit.tokens(engine, kit.prompt(1), None, Sampling(5)) == kit.answer(kit.prompt(1), None, 5)


@pytest.mark.parametrize(
    "wish",
    [
        Sampling(0),
        Sampling(1, temperature=-1),
        Sampling(1, temperature=float("nan")),
        Sampling(1, top_p=0),
        Sampling(1, top_k=-1),
        Sampling(1, repetition_penalty=0),
        Sampling(1, logprobs=-1),
    ],
)
async def test_sampling_that_draws_nothing_is_refused(kit: Any, engine: Any, wish: Sampling) -> None:
    assert (await kit.refusal(kit.tokens(engine, kit.prompt(1), None, wish))).reason == "REQUEST_INVALID"


async def test_what_cannot_be_served_is_refused(kit: Any, engine: Any) -> None:
    assert (await kit.refusal(kit.tokens(engine, kit.prompt(1, 512), None, GREEDY))).reason == "TOO_LONG"
    wish = Sampling(5, json_schema="{}")
    assert (await kit.refusal(kit.tokens(engine, kit.prompt(1), None, wish))).reason == "SCHEMA_UNSUPPORTED"
    missing = await kit.refusal(engine.score("t", "ab" * 32, kit.prompt(1, supervised=2), 0))
    assert missing.reason == "ADAPTER_NOT_LOADED"
    assert (await kit.refusal(engine.score("t", "", kit.prompt(1, 4, supervised=4), 0))).reason == "REQUEST_INVALID"


async def test_a_full_queue_refuses_with_a_time(kit: Any) -> None:
    engine = await EngineProcess.start(kit.base, 1, waiting=2, running=1)
    prompt, wish = kit.prompt(1), Sampling(300)
    steps = [engine.generate("t", "", prompt, wish)]
    await anext(steps[0])
    waiting = [asyncio.create_task(anext(engine.generate(tenant, "", prompt, wish))) for tenant in "ab"]
    await kit.until(lambda: engine.stats().waiting == 2)
    error = await kit.refusal(kit.tokens(engine, prompt, None, wish, tenant="c"))
    assert error.reason == "QUEUE_FULL"
    assert error.retry_s is not None
    assert 0 < error.retry_s <= 60
    await steps[0].aclose()
    await asyncio.gather(*waiting)
    await engine.close()


async def test_a_killed_engine_fails_what_it_had_and_is_gone(kit: Any) -> None:
    engine = await EngineProcess.start(kit.base, 1)
    asking = [asyncio.create_task(kit.tokens(engine, kit.prompt(seed), None, Sampling(400))) for seed in range(3)]
    await kit.until(lambda: engine.stats().running == 3)
    gone = asyncio.create_task(engine.gone())
    os.kill(engine.pid, signal.SIGKILL)
    for task in asking:
        assert (await kit.refusal(task)).reason == "ENGINE_GONE"
    await asyncio.wait_for(gone, 10)
    assert (await kit.refusal(kit.tokens(engine, kit.prompt(1), None, GREEDY))).reason == "ENGINE_GONE"
    assert (await kit.refusal(engine.load_adapter("ab" * 32, Path("x")))).reason == "ENGINE_GONE"
    await engine.close()
    await engine.close()


async def test_closing_ends_the_process(kit: Any) -> None:
    engine = await EngineProcess.start(kit.base, 1)
    asking = asyncio.create_task(kit.tokens(engine, kit.prompt(1), None, Sampling(400)))
    await kit.until(lambda: engine.stats().running == 1)
    await engine.close()
    assert (await kit.refusal(asking)).reason == "ENGINE_GONE"
    await asyncio.wait_for(engine.gone(), 10)
    assert not psutil.pid_exists(engine.pid)
    assert await engine._process.ended() == 0  # by itself, at the end of its socket


PARENT = """
import asyncio, sys
from pathlib import Path
from veneer_inference.engine.client import EngineProcess

async def main():
    engine = await EngineProcess.start(Path(sys.argv[1]), 1)
    print(engine.pid, flush=True)
    await engine.gone()

asyncio.run(main())
"""


async def test_an_engine_does_not_outlive_its_service(kit: Any) -> None:
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(kit.base), stdout=asyncio.subprocess.PIPE
    )
    assert service.stdout is not None
    engine = psutil.Process(int(await service.stdout.readline()))
    service.kill()
    await service.wait()
    await kit.until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


async def test_a_base_that_cannot_be_read_is_told(kit: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    error = await kit.refusal(EngineProcess.start(tmp_path, 1))
    assert error.reason == "ENGINE_GONE"
    assert "model" in str(error)
