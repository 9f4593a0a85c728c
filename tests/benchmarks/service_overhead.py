"""S1: what the inference service adds to a call, against a bare grpc.aio server that answers the same messages.

python tests/benchmarks/service_overhead.py [--calls 1000] [--runs 5]

The engine answers at once. Unary calls one after another; 64 streams side by side at a real step's pace, of which the
time from each message to the next counts.
"""

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from inference_limits import spread

from veneer.dataset.v1.conversation_pb2 import Message, Part, Role
from veneer.inference.v1 import inference_service_pb2 as pb
from veneer.inference.v1.inference_pb2 import Prompt, SamplingParams
from veneer.inference.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from veneer_base.unfold import base_directory
from veneer_digests import model_digest
from veneer_inference.ports import EngineInfo, EnginePrompt, EngineStats, Sampling, Step
from veneer_inference.replica import Replica
from veneer_inference.settings import InferenceSettings
from veneer_rpc import logs
from veneer_rpc.tokens import add_token

STREAMS, MESSAGES, STEP_S = 64, 16, 0.05


class InstantEngine:
    """Answers with one token again and again; a stream at the pace of steps."""

    def __init__(self, digest: str) -> None:
        self.info = EngineInfo(digest, "float32", "cpu", "instant", 4096, 1 << 20, 8, 64)
        self._gone = asyncio.Event()

    async def generate(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, sampling: Sampling
    ) -> AsyncIterator[Step]:
        for index in range(sampling.max_tokens):
            if index:
                await asyncio.sleep(STEP_S)
            yield Step((100,), finish="length" if index + 1 == sampling.max_tokens else "")

    def stats(self) -> EngineStats:
        return EngineStats()

    async def gone(self) -> None:
        await self._gone.wait()

    async def close(self) -> None:
        self._gone.set()


class Bare(InferenceServiceServicer):
    """The same messages, from nowhere."""

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:  # noqa: ANN401
        return pb.GenerateResponse(text="x", token_ids=[100])

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[pb.StreamGenerateResponse]:  # noqa: ANN401
        for index in range(request.sampling.max_tokens):
            if index:
                await asyncio.sleep(STEP_S)
            yield pb.StreamGenerateResponse(text="x", token_ids=[100])


def serve(folder: Path, pipe: Connection, bare: bool) -> None:
    """Serves until the other end of the pipe closes."""
    asyncio.run(_serve_bare(pipe) if bare else _serve_own(folder, pipe))


async def _serve_own(folder: Path, pipe: Connection) -> None:
    logs.configure("error", "json")
    base = base_directory()
    digest = model_digest(base)
    settings = InferenceSettings(
        tokens_file=folder / "tokens.json", data=folder / "data", replica="bench", models=f"tiny={base}",
        trainer="127.0.0.1:1", trainer_token_file=folder / "replica.token", dataset="127.0.0.1:1", grace_s=0.0,
        report_s=3600.0,
    )  # fmt: skip

    async def start() -> Any:  # noqa: ANN401
        return InstantEngine(digest)

    replica = Replica(settings, start)
    pipe.send(await replica.start())
    await _closed(pipe)
    await replica.stop()
    await replica.close()


async def _serve_bare(pipe: Connection) -> None:
    server = grpc.aio.server()
    add_InferenceServiceServicer_to_server(Bare(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(f"127.0.0.1:{port}")
    await _closed(pipe)
    await server.stop(0)


async def _closed(pipe: Connection) -> None:
    with contextlib.suppress(EOFError):
        await asyncio.to_thread(pipe.recv)


async def measure(addresses: dict[str, str], token: str, options: argparse.Namespace) -> None:
    metadata = (("authorization", f"Bearer {token}"),)
    stubs = {name: InferenceServiceStub(grpc.aio.insecure_channel(address)) for name, address in addresses.items()}
    prompt = Prompt(messages=[Message(role=Role.ROLE_USER, parts=[Part(text="Which digit is this? " * 8)])])
    unary = pb.GenerateRequest(model="models/tiny", prompt=prompt, sampling=SamplingParams(max_tokens=1))
    streamed = pb.StreamGenerateRequest(
        model="models/tiny", prompt=prompt, sampling=SamplingParams(max_tokens=MESSAGES)
    )

    async def call(stub: Any) -> float:  # noqa: ANN401
        started_s = time.perf_counter()
        await stub.Generate(unary, metadata=metadata)
        return time.perf_counter() - started_s

    async def gaps(stub: Any) -> list[float]:  # noqa: ANN401
        """Seconds from a message of a stream to the next."""
        times_s = [time.perf_counter() async for _ in stub.StreamGenerate(streamed, metadata=metadata)]
        return [after - before for before, after in itertools.pairwise(times_s)]

    added: dict[str, list[float]] = {}
    for run in range(-1, options.runs):  # the first warms up
        for kind in ("unary", f"{STREAMS} streams"):
            taken_s: dict[str, list[float]] = {}
            for name, stub in stubs.items():
                if kind == "unary":
                    taken_s[name] = [await call(stub) for _ in range(options.calls)]
                else:
                    streams = await asyncio.gather(*(gaps(stub) for _ in range(STREAMS)))
                    taken_s[name] = [gap_s for stream in streams for gap_s in stream]
            for percent in (50, 99):
                own, bare = (percentile(taken_s[name], percent) for name in ("own", "bare"))
                if run >= 0:
                    added.setdefault(f"{kind}, p{percent}", []).append(1000 * (own - bare))
    for name, found in added.items():
        print(f"{name}: {spread(found, 2)} ms added to a bare grpc.aio server's")


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def main(options: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")  # a process that forks after gRPC started misbehaves
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        token = add_token(folder / "tokens.json", "bench", ["user"])
        (folder / "replica.token").write_text("unused\n")
        pipes, processes, addresses = [], [], {}
        for kind in ("own", "bare"):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(folder, theirs, kind == "bare"))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
            addresses[kind] = ours.recv()
        try:
            asyncio.run(measure(addresses, token, options))
        finally:
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    main(parser.parse_args())
