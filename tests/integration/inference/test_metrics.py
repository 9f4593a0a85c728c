# ruff: noqa: ANN401  # the kit is the conftest's
"""What Prometheus reads of a live replica."""

import asyncio
import urllib.error
import urllib.request
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from veneer_inference.domain.registry import Release
from veneer_inference.metrics import MOST_ADAPTERS, Metrics
from veneer_inference.ports import EngineError
from veneer_rpc.names import AdapterVersionName
from veneer_rpc.server import BindError


class Page:
    """A scrape: values by name and labels."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.undocumented = [family.name for family in families if not family.documentation]
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._samples.get((name, frozenset(labels.items())))


async def read(address: str) -> Page:
    def get() -> str:
        with urllib.request.urlopen(address, timeout=10) as response:  # noqa: S310  # our own
            assert response.headers["Content-Type"].startswith("text/plain")
            return str(response.read().decode())

    return Page(await asyncio.to_thread(get))


async def test_a_scrape_tells_how_answers_went_by_adapter(kit: Any) -> None:
    kit.registry.publish("acme", "digits", 1)
    kit.registry.publish("acme", "digits", 2)
    kit.registry.promote("acme", "digits", production=1)
    await kit.start(metrics_port=0)
    digits = {"tenant": "acme", "adapter": "digits"}
    answers = [await kit.ask("adapters/digits") for _ in range(3)]
    await kit.ask("models/tiny", max_tokens=1)
    kit.registry.promote("acme", "digits", production=2)
    await kit.until(lambda: kit.replica._registry.revision == kit.registry.revision)
    kit.engine.next_errors.append(EngineError("QUEUE_FULL", ["full"], 1.0))
    with pytest.raises(grpc.aio.AioRpcError):
        await kit.ask("adapters/digits")
    kit.engine.pace.clear()
    stream = kit.stub().StreamGenerate(kit.stream_request("adapters/digits"))
    await stream.read()
    page = await read(kit.replica.metrics_address)
    assert page("veneer_adapter_active_requests", **digits, version="2") == 1
    assert page("veneer_adapter_in_slot", **digits, version="2") == 1
    assert page("veneer_adapter_active_requests", **digits, version="1") == 0
    stream.cancel()
    await kit.until(lambda: not kit.engine.active)

    page = await read(kit.replica.metrics_address)
    assert page.undocumented == []
    assert page("veneer_requests_total", **digits, outcome="answered") == 3
    assert page("veneer_requests_total", **digits, outcome="refused") == 1
    assert page("veneer_requests_total", **digits, outcome="cancelled") == 1
    assert page("veneer_requests_total", tenant="", adapter="", outcome="answered") == 1
    assert page("veneer_time_to_first_token_seconds_count", **digits) == 4
    assert page("veneer_time_per_token_seconds_count", **digits) == 3
    assert page("veneer_time_per_token_seconds_count", tenant="", adapter="") is None  # one token has no next
    assert page("veneer_queue_seconds_count", **digits) == 4
    assert page("veneer_answer_tokens_total", **digits) == 1 + sum(each.usage.answer_tokens for each in answers)
    assert page("veneer_prompt_tokens_total", **digits) == 4 * answers[0].usage.prompt_tokens
    assert page("veneer_cached_prompt_tokens_total", **digits) == 4 * 2
    assert page("veneer_adapter_swaps_total", **digits) == 1
    assert page("veneer_engine_up") == 1
    assert page("veneer_engine_adapter_slots") == 8
    assert page("veneer_engine_adapters") == 2
    assert page("veneer_engine_kv_capacity_tokens") == 4096


async def test_a_scrape_while_the_engine_is_away_says_so(kit: Any) -> None:
    await kit.start(metrics_port=0)

    async def never() -> Any:
        await asyncio.Event().wait()

    kit.replica._keeper._start_engine = never
    kit.engine.die()
    await kit.until(lambda: kit.replica._keeper._base is None)
    page = await read(kit.replica.metrics_address)
    assert page("veneer_engine_up") == 0
    assert page("veneer_engine_running_requests") is None


async def test_nothing_but_the_page_is_served_and_on_loopback_alone(kit: Any) -> None:
    await kit.start(metrics_port=0)
    address = kit.replica.metrics_address
    assert address.startswith("http://127.0.0.1:")
    for url, data, status in ((address.replace("/metrics", "/"), None, 404), (address, b"x", 405)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            await asyncio.to_thread(urllib.request.urlopen, url, data, 10)
        assert refused.value.code == status
        refused.value.close()
    port = int(address.split(":")[2].partition("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /" + b"x" * 100_000)  # no end in sight
    assert await reader.read() == b""
    writer.close()
    assert (await read(address))("veneer_engine_up") == 1
    with pytest.raises(BindError, match=f"metrics: cannot listen on 127.0.0.1:{port}"):
        await kit.replica._metrics_page.start(port)


async def test_without_a_port_there_is_no_page(kit: Any) -> None:
    await kit.start()
    assert kit.replica.metrics_address == ""
    assert kit.replica._metrics_page._server is None


def test_adapters_beyond_the_bound_share_one_label() -> None:
    metrics = Metrics(lambda: None, list)
    for number in range(2 * MOST_ADAPTERS):
        release = Release("acme", AdapterVersionName(f"a{number}", 1), "ab" * 32)
        metrics.ended("acme", release, "answered", prompt_tokens=1, answer_tokens=2)
    text = metrics.snapshot()().decode()
    assert len({line for line in text.splitlines() if line.startswith("veneer_requests_total")}) <= MOST_ADAPTERS
    page = Page(text)
    others = page("veneer_requests_total", tenant="", adapter="others", outcome="answered")
    assert others == 2 * MOST_ADAPTERS - (MOST_ADAPTERS - 2)
