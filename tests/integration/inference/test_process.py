# ruff: noqa: ANN401  # the kit is the conftest's
"""The process itself with the real engine: real weights answer, adapters change the answer, and faults heal."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from veneer.dataset.v1.conversation_pb2 import Message, Part, Role
from veneer.inference.v1 import inference_pb2
from veneer.inference.v1 import inference_service_pb2 as pb
from veneer_vlm import peft_folder
from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter, AdapterConfig


class Process:
    """`python -m veneer_inference` and its flags."""

    def __init__(self, kit: Any) -> None:
        self.kit = kit
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        flags = {
            "bind": "127.0.0.1:0", "tokens-file": self.kit.tmp / "tokens.json", "data": self.kit.tmp / "data",
            "replica": "r1", "models": f"tiny={self.kit.base}", "trainer": self.kit.registry.address,
            "trainer-token-file": self.kit.tmp / "replica.token", "dataset": self.kit.datasets.address,
            "delegation-public-key-file": self.kit.tmp / "public.pem", "threads": 1, "report-s": 0.1,
            "die-with-parent": "true", "grace-s": 20,
        }  # fmt: skip
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "veneer_inference",
            *(str(text) for flag, value in flags.items() for text in (f"--{flag}", value)),
            stdout=asyncio.subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if line.startswith(b"veneer_inference listening on "):
                self.kit.address = line.decode().split()[-1]
                return
        raise AssertionError("it ended before it listened")

    async def stop(self) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        await process.stdout.read()
        return await process.wait()

    def engine_pid(self) -> int:
        assert self.process is not None
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _parent(entry) == self.process.pid:
                return int(entry.name)
        return 0


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture
async def process(kit: Any) -> AsyncIterator[Process]:
    process = Process(kit)
    try:
        yield process
    finally:
        if process.process is not None:
            await process.stop()


def train(kit: Any, version: int) -> None:
    """Publishes a version that changes answers: an adapter of the base's shape with large random factors."""
    model = ModelConfig.from_directory(kit.base)
    adapter = Adapter.new(model, AdapterConfig(r=4, lora_alpha=64), seed=version)
    generator = torch.Generator().manual_seed(version)
    for pair in adapter.pairs.values():
        pair.b_O_R.normal_(0, 0.5, generator=generator)
    name = f"adapters/digits/versions/{version}"
    directory = kit.registry.folders / "real" / str(version)
    peft_folder.write(adapter, directory)
    (directory / "processing_contract.json").write_text(json.dumps(kit.registry.processor.contract.to_dict()))
    kit.registry.versions["acme", name] = directory


async def test_a_real_engine_answers_swaps_dies_heals_and_stops(kit: Any, process: Process) -> None:
    for version in (1, 2):
        train(kit, version)
    kit.registry.promote("acme", "digits", production=1)
    await process.start()
    stub = kit.stub()

    async def answer(model: str) -> pb.GenerateResponse:
        request = kit.request(model, kit.png(64, 64, seed=3), "What is this?", max_tokens=12)
        return await stub.Generate(request, timeout=60)

    base = await answer("models/tiny")
    first, second = await answer("adapters/digits"), await answer("adapters/digits/versions/2")
    assert len({base.text, first.text, second.text}) == 3
    assert base.usage.visual_tokens == 4

    streams = [
        [each async for each in stub.StreamGenerate(kit.stream_request("adapters/digits", max_tokens=8))]
        for _ in range(2)
    ]
    assert streams[0][-1].served_by.adapter_version == "adapters/digits/versions/1"
    assert [each.token_ids for each in streams[0]] == [each.token_ids for each in streams[1]]

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


async def test_a_hundred_swaps_under_load_fail_no_request_and_mix_no_versions(kit: Any, process: Process) -> None:
    for version in (1, 2, 3):
        train(kit, version)
        kit.registry.share("acme", "other", "digits", version)
    for tenant in ("acme", "other"):
        kit.registry.promote(tenant, "digits", production=1)
    await process.start()
    right = {
        f"adapters/digits/versions/{version}": list(
            (await kit.ask(f"adapters/digits/versions/{version}", max_tokens=6)).token_ids
        )
        for version in (1, 2, 3)
    }
    assert len({tuple(each) for each in right.values()}) == 3
    stop, whole, broken_off = asyncio.Event(), 0, 0

    async def ask_on(index: int) -> None:
        nonlocal whole, broken_off
        stub, turn = kit.stub(("acme", "other")[index % 2]), index
        while not stop.is_set():
            turn += 1
            stream = stub.StreamGenerate(kit.stream_request("adapters/digits", max_tokens=6), timeout=60)
            token_ids: list[int] = []
            async for piece in stream:
                token_ids += piece.token_ids
                if piece.HasField("served_by"):
                    version = piece.served_by.adapter_version
                if turn % 5 == 0:
                    stream.cancel()
                    broken_off += 1
                    break
            else:
                assert token_ids == right[version]
                whole += 1

    asking = [asyncio.create_task(ask_on(index)) for index in range(8)]
    for swap in range(100):
        for tenant in ("acme", "other"):
            kit.registry.promote(tenant, "digits", production=1 + (swap + (tenant == "other")) % 3)
        seen = whole
        await kit.until(lambda seen=seen: whole > seen or any(task.done() for task in asking))
    stop.set()
    await asyncio.gather(*asking)
    assert whole >= 100
    assert broken_off > 0

    async def quiet() -> bool:
        page = await kit.stub().ListLoadedAdapters(pb.ListLoadedAdaptersRequest())
        return not any(each.active_requests for each in page.loaded_adapters)

    await kit.until(quiet)


async def test_settings_that_cannot_be_used_are_told(kit: Any) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "veneer_inference", "--models", "tiny", "--replica", "", "--nonsense", "1",
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await child.communicate()
    assert child.returncode == 2
    for problem in ("--nonsense: no such flag", "tokens_file: must be given", "data: must be given"):
        assert problem in said.decode()
