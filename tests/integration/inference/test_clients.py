# ruff: noqa: ANN401  # the kit is the conftest's
"""Clients that die, freeze, or come ten times as many: what they held is freed, and others are served."""

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from typing import Any

import grpc
import pytest

CLIENT = """
import sys, time, grpc
from veneer.dataset.v1.conversation_pb2 import Message, Part
from veneer.inference.v1.inference_pb2 import Prompt
from veneer.inference.v1.inference_service_pb2 import StreamGenerateRequest
from veneer.inference.v1.inference_service_pb2_grpc import InferenceServiceStub

address, token = sys.argv[1:]
message = Message(role="ROLE_USER", parts=[Part(text="Which digit is this?")])
request = StreamGenerateRequest(model="models/tiny", prompt=Prompt(messages=[message]))
stub = InferenceServiceStub(grpc.insecure_channel(address))
for piece in stub.StreamGenerate(request, metadata=(("authorization", "Bearer " + token),)):
    print("begun", flush=True)
"""
KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 1.0, 0.5


@pytest.mark.parametrize(
    ("number", "within_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, KEEPALIVE_S + KEEPALIVE_TIMEOUT_S + 2)]
)
async def test_what_a_lost_client_held_is_freed(kit: Any, number: int, within_s: float) -> None:
    await kit.start(keepalive_s=KEEPALIVE_S, keepalive_timeout_s=KEEPALIVE_TIMEOUT_S)
    kit.engine.pace.clear()
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, kit.address, kit.tokens["acme"], stdout=asyncio.subprocess.PIPE
    )
    try:
        assert client.stdout is not None
        assert await asyncio.wait_for(client.stdout.readline(), 60) == b"begun\n"
        assert kit.engine.active == [""]
        os.kill(client.pid, number)
        lost_s = time.monotonic()
        await kit.until(lambda: not kit.engine.active)
        assert time.monotonic() - lost_s < within_s
        assert kit.engine.cancelled == 1
        kit.engine.pace.set()
        assert (await kit.ask("models/tiny")).text
    finally:
        if client.returncode is None:
            client.kill()
        await client.wait()


@pytest.mark.e2e_long
@pytest.mark.timeout(600)
async def test_ten_times_the_load_is_refused_with_a_time_and_goodput_stays(kit: Any, capsys: Any) -> None:
    process = kit.process()
    process.flags["max-waiting"] = 8
    await process.start()

    async def goodput(clients: int, seconds: float) -> tuple[float, Counter[Any], list[float]]:
        answers, times_s, end_s = Counter[Any](), list[float](), time.monotonic() + seconds

        async def ask_on(index: int) -> None:
            stub = kit.stub(("acme", "other")[index % 2])
            while time.monotonic() < end_s:
                began_s = time.monotonic()
                try:
                    await stub.Generate(kit.request("models/tiny", max_tokens=16), timeout=60)
                except grpc.aio.AioRpcError as error:
                    answers[error.code()] += 1
                    await asyncio.sleep(kit.retry_s(error))
                else:
                    answers[grpc.StatusCode.OK] += 1
                    times_s.append(time.monotonic() - began_s)

        began_s = time.monotonic()
        await asyncio.gather(*(ask_on(index) for index in range(clients)))
        return answers[grpc.StatusCode.OK] / (time.monotonic() - began_s), answers, times_s

    await goodput(8, 3)
    peak, alone, _ = await goodput(64, 15)
    crowded, answers, _ = await goodput(640, 15)
    with capsys.disabled():
        print(f"\n64 clients {peak:.1f} answers/s {dict(alone)}; 640 clients {crowded:.1f}/s {dict(answers)}")
    assert set(answers) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert crowded >= 0.8 * peak
    assert (await kit.ask("models/tiny", max_tokens=1)).token_ids


@pytest.mark.e2e_long
@pytest.mark.timeout(600)
async def test_a_slow_client_holds_nobody_up(kit: Any, capsys: Any) -> None:
    process = kit.process()
    await process.start()
    reading = asyncio.Event()
    reading.set()

    async def stream_on() -> None:
        """Reads long answers as they come, or only their beginning."""
        stub = kit.stub("other")
        while True:
            stream = stub.StreamGenerate(kit.stream_request("models/tiny", max_tokens=1000))
            await stream.read()
            await reading.wait()
            async for _ in stream:
                await reading.wait()

    async def p99_s(seconds: float) -> float:
        found, end_s = list[float](), time.monotonic() + seconds

        async def ask_on() -> None:
            stub = kit.stub()
            while time.monotonic() < end_s:
                began_s = time.monotonic()
                await stub.Generate(kit.request("models/tiny", max_tokens=16), timeout=60)
                found.append(time.monotonic() - began_s)

        await asyncio.gather(*(ask_on() for _ in range(4)))
        return sorted(found)[-(-99 * len(found) // 100) - 1]

    streams = [asyncio.create_task(stream_on()) for _ in range(4)]
    await p99_s(3)
    read_s = await p99_s(20)
    reading.clear()
    unread_s = await p99_s(20)
    for stream in streams:
        stream.cancel()
    with capsys.disabled():
        print(f"\np99 of others: {read_s * 1000:.0f} ms beside four that read, {unread_s * 1000:.0f} ms if they do not")
    assert unread_s <= 1.2 * read_s
