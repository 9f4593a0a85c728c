# ruff: noqa: ANN401  # the kit is the conftest's
"""The process itself with the real engine: real weights answer, adapters change the answer, and faults heal."""

import asyncio
import json
import os
import signal
import sys
from typing import Any

import grpc
import pytest

from veneer.dataset.v1.conversation_pb2 import Message, Part, Role
from veneer.inference.v1 import inference_pb2
from veneer.inference.v1 import inference_service_pb2 as pb


async def test_a_real_engine_answers_swaps_dies_heals_and_stops(kit: Any) -> None:
    for version in (1, 2):
        kit.train(version)
    kit.registry.promote("acme", "digits", production=1)
    process = kit.process()
    await process.start()
    stub = kit.stub()

    async def answer(model: str) -> pb.GenerateResponse:
        request = kit.request(model, kit.png(64, 64, seed=3), "What is this?", max_tokens=12)
        return await stub.Generate(request, timeout=60)

    schema = {"type": "object", "properties": {"digit": {"enum": [3, 7]}}, "required": ["digit"]}
    closed = json.dumps(schema | {"additionalProperties": False})
    held = await stub.Generate(kit.request("models/tiny", "Which digit?", max_tokens=64, json_schema=closed))
    assert json.loads(held.text)["digit"] in (3, 7)
    with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.json_schema"):
        await stub.Generate(kit.request("models/tiny", "Which digit?", json_schema='{"type": "digit"}'))

    base = await answer("models/tiny")
    first, second = await answer("adapters/digits"), await answer("adapters/digits/versions/2")
    assert len({base.text, first.text, second.text}) == 3
    assert base.usage.visual_tokens == 4

    streams = [
        [each async for each in stub.StreamGenerate(kit.stream_request("adapters/digits", max_tokens=8))]
        for _ in range(2)
    ]
    assert streams[0][-1].served_by.adapter_version == "adapters/digits/versions/1"
    one, other = ([token for each in stream for token in each.token_ids] for stream in streams)
    assert one == other

    kit.registry.promote("acme", "digits", production=2)

    async def moved() -> bool:
        now = await answer("adapters/digits")
        assert now.token_ids == (second if now.served_by.adapter_version[-1] == "2" else first).token_ids
        return now.served_by.adapter_version == "adapters/digits/versions/2"

    await kit.until(moved)

    messages = [
        Message(role=Role.ROLE_USER, parts=[Part(text="What is this?")]),
        Message(role=Role.ROLE_ASSISTANT, parts=[Part(text="A seven.")]),
    ]
    request = pb.ScoreRequest(model="models/tiny", prompt=inference_pb2.Prompt(messages=messages), top_logprobs=1)
    scored = await stub.Score(request, timeout=60)
    assert scored.total_logprob < 0
    assert b"".join(each.token for each in scored.messages[0].tokens) == b"A seven.<|im_end|>"

    os.kill(process.engine_pid(), signal.SIGKILL)

    async def heals() -> bool:
        try:
            return (await answer("adapters/digits")).token_ids == second.token_ids
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False

    await kit.until(heals, 60)
    engine = process.engine_pid()
    assert await process.stop() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


async def test_settings_that_cannot_be_used_are_told(kit: Any) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "veneer_inference", "--models", "tiny", "--replica", "", "--nonsense", "1",
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await child.communicate()
    assert child.returncode == 2
    for problem in ("--nonsense: no such flag", "tokens_file: must be given", "data: must be given"):
        assert problem in said.decode()
