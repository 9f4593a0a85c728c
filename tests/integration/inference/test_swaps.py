# ruff: noqa: ANN401  # the kit is the conftest's
"""Hot swaps of real adapters under load: no request fails, no answer is a mixture or of a wrong version.

A hundred in `make test`; a thousand in `make faults`, which also holds time and memory to their limits and prints them.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from veneer.inference.v1 import inference_service_pb2 as pb

VERSIONS = (1, 2, 3)
TENANTS = ("acme", "other")
STREAMS = 8
ABORTED_EVERY = 5
MAX_TOKENS = 6
WARM_UP = 0.2  # of the swaps: memory is flat after them
STEADY_S = 10.0
SLOWER = 1.5
GROWTH = 1.03


@dataclass
class Load:
    """Streams that ask on and on, and what came of it."""

    kit: Any
    right: dict[str, list[int]]
    latencies_s: list[float] = field(default_factory=list)
    first_tokens_s: list[float] = field(default_factory=list)
    aborted: int = 0
    wrong: list[tuple[str, list[int]]] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask_on(self, index: int) -> None:
        stub, turn = self.kit.stub(TENANTS[index % len(TENANTS)]), index
        while not self.stop.is_set():
            turn += 1
            began_s = time.monotonic()
            stream = stub.StreamGenerate(
                self.kit.stream_request("adapters/digits", max_tokens=MAX_TOKENS), timeout=60
            )  # fmt: skip
            token_ids: list[int] = []
            version = ""
            async for piece in stream:
                if not token_ids:
                    self.first_tokens_s.append(time.monotonic() - began_s)
                token_ids += piece.token_ids
                version = piece.served_by.adapter_version or version
                if turn % ABORTED_EVERY == 0:
                    stream.cancel()
                    self.aborted += 1
                    break
            else:
                self.latencies_s.append(time.monotonic() - began_s)
                self.versions.add(version)
                if token_ids != self.right[version]:
                    self.wrong.append((version, token_ids))


@pytest.mark.parametrize("swaps", [100, pytest.param(1000, marks=[pytest.mark.e2e_long, pytest.mark.timeout(1800)])])
async def test_swaps_under_load_fail_no_request_and_mix_no_versions(kit: Any, swaps: int, capsys: Any) -> None:
    for version in VERSIONS:
        kit.train(version)
        kit.registry.share("acme", "other", "digits", version)
    for tenant in TENANTS:
        kit.registry.promote(tenant, "digits", production=1)
    process = kit.process()
    await process.start()
    measured = swaps >= 1000
    names = [f"adapters/digits/versions/{version}" for version in VERSIONS]
    right = {name: list((await kit.ask(name, max_tokens=MAX_TOKENS)).token_ids) for name in names}
    assert len(set(map(tuple, right.values()))) == len(VERSIONS)
    load = Load(kit, right)
    asking = [asyncio.create_task(load.ask_on(index)) for index in range(STREAMS)]
    served = psutil.Process(process.process.pid), psutil.Process(process.engine_pid())
    memory_bytes: list[int] = []
    if measured:
        await asyncio.sleep(STEADY_S / 2)
        load.latencies_s.clear(), load.first_tokens_s.clear()
        await asyncio.sleep(STEADY_S)
    steady, first_steady = list(load.latencies_s), list(load.first_tokens_s)
    load.latencies_s.clear(), load.first_tokens_s.clear()
    began_s = time.monotonic()
    for swap in range(swaps):
        for tenant in TENANTS:
            kit.registry.promote(tenant, "digits", production=1 + (swap + (tenant == "other")) % len(VERSIONS))
        seen = len(load.latencies_s)
        await kit.until(lambda seen=seen: len(load.latencies_s) > seen or any(task.done() for task in asking))
        memory_bytes.append(sum(each.memory_info().rss for each in served))
    load.stop.set()
    await asyncio.gather(*asking)  # a request that failed raises here
    took_s = time.monotonic() - began_s
    assert not load.wrong
    assert len(load.latencies_s) >= swaps
    assert load.aborted > 0
    assert load.versions == set(names)

    async def quiet() -> bool:
        page = await kit.stub().ListLoadedAdapters(pb.ListLoadedAdaptersRequest())
        return not any(each.active_requests for each in page.loaded_adapters)

    await kit.until(quiet, 1.0)
    if not measured:
        return
    warm = memory_bytes[int(WARM_UP * swaps) :]
    early_bytes, late_bytes = (percentile(part, 50) for part in (warm[: len(warm) // 4], warm[-len(warm) // 4 :]))
    figures = {
        "swaps of each of two tenants' alias": f"{swaps}, {swaps / took_s:.1f} a second",
        "whole answers, aborted": f"{len(load.latencies_s):,}, {load.aborted:,}",
        "failed requests, answers of a wrong version": "0, 0",
        "answer p50 / p99, steady": f"{row(steady)} ms of {len(steady):,}",
        "answer p50 / p99, swapping": f"{row(load.latencies_s)} ms",
        "first token p50 / p99, steady": f"{row(first_steady)} ms",
        "first token p50 / p99, swapping": f"{row(load.first_tokens_s)} ms",
        "p99, swapping : steady": f"{percentile(load.latencies_s, 99) / percentile(steady, 99):.2f}",
        "memory after warm-up, early to late": f"{early_bytes / 1e6:.1f} to {late_bytes / 1e6:.1f} MB",
        "references when quiet": "0",
    }
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:<46} {value}" for name, value in figures.items()))
    assert late_bytes <= GROWTH * early_bytes
    assert percentile(load.latencies_s, 99) <= SLOWER * percentile(steady, 99)


def percentile(values: Any, percent: int) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return float(ordered[-(-percent * len(ordered) // 100) - 1])


def row(values_s: list[float]) -> str:
    return f"{1000 * percentile(values_s, 50):.0f} / {1000 * percentile(values_s, 99):.0f}"
