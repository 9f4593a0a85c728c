# ruff: noqa: ANN401  # the kit is the conftest's
"""A replica follows the registry: promotes, preloads, deletions, and a trainer that goes away."""

import asyncio
import json
from typing import Any

import grpc
import pytest

from veneer.inference.v1 import inference_service_pb2 as pb


async def refused(call: Any, code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value.details()
    return str(caught.value.details())


def published(kit: Any, versions: int = 2, tenant: str = "acme") -> list[str]:
    digests = [kit.registry.publish(tenant, "digits", version) for version in range(1, versions + 1)]
    kit.registry.promote(tenant, "digits", production=1)
    return digests


async def test_a_promote_moves_new_requests_while_streams_stay_with_their_version(kit: Any) -> None:
    old, new = published(kit)
    await kit.start()
    kit.engine.pace.clear()
    streams = [kit.stub().StreamGenerate(kit.stream_request("adapters/digits")) for _ in range(4)]
    first = [await stream.read() for stream in streams]
    kit.registry.promote("acme", "digits", production=2)

    async def moved() -> bool:
        stream = kit.stub().StreamGenerate(kit.stream_request("adapters/digits"))
        piece = await stream.read()
        stream.cancel()
        return bool(piece.served_by.adapter_digest == new)

    await kit.until(moved)
    kit.engine.pace.set()
    for begun, stream in zip(first, streams, strict=True):
        pieces = [begun, *[each async for each in stream]]
        assert "".join(each.text for each in pieces) == kit.engine.says(old)
        assert {pieces[0].served_by.adapter_digest, pieces[-1].served_by.adapter_digest} == {old}
    response = await kit.ask("adapters/digits")
    assert response.served_by.adapter_version == "adapters/digits/versions/2"
    assert response.text == kit.engine.says(new)


async def test_hot_swaps_under_eight_streams_break_none_and_each_answer_names_its_version(kit: Any) -> None:
    digests = published(kit, 4)
    await kit.start()
    swaps, answers = 0, 0
    stop = asyncio.Event()

    async def ask_on() -> None:
        nonlocal answers
        stub = kit.stub()
        while not stop.is_set():
            pieces = [each async for each in stub.StreamGenerate(kit.stream_request("adapters/digits"))]
            served = pieces[0].served_by
            assert served == pieces[-1].served_by
            assert served.adapter_digest == digests[int(served.adapter_version[-1]) - 1]
            assert "".join(each.text for each in pieces) == kit.engine.says(served.adapter_digest)
            answers += 1

    asking = [asyncio.create_task(ask_on()) for _ in range(8)]
    while swaps < 40:
        swaps += 1
        kit.registry.promote("acme", "digits", production=1 + swaps % 4)
        seen = answers
        await kit.until(lambda seen=seen: answers > seen)
        assert not any(task.done() for task in asking), [task for task in asking if task.done()]
    stop.set()
    await asyncio.gather(*asking)
    assert answers >= 40
    assert kit.engine.active == []


async def test_what_is_preloaded_is_there_before_a_request(kit: Any) -> None:
    old, new = published(kit)
    kit.registry.promote("acme", "digits", preload=True)
    await kit.start()
    await kit.until(lambda: old in kit.engine.held)
    kit.registry.promote("acme", "digits", preload=True, production=2)
    await kit.until(lambda: new in kit.engine.held)
    loads = list(kit.engine.loads)
    await kit.ask("adapters/digits")
    assert kit.engine.loads == loads


async def test_a_used_adapters_next_version_is_loaded_ahead_and_an_unused_one_is_not(kit: Any) -> None:
    _, new = published(kit)
    other = kit.registry.publish("other", "digits", 1)
    kit.registry.promote("other", "digits", production=1)
    await kit.start()
    await kit.ask("adapters/digits")
    kit.registry.promote("acme", "digits", production=2)
    await kit.until(lambda: new in kit.engine.held)
    assert other not in kit.engine.held


async def test_a_deleted_adapter_is_gone_from_engine_and_disk_while_its_streams_finish(kit: Any) -> None:
    old, _ = published(kit)
    await kit.start()
    kit.engine.pace.clear()
    stream = kit.stub().StreamGenerate(kit.stream_request("adapters/digits"))
    begun = await stream.read()
    kit.registry.delete("acme", "digits")
    await kit.until(lambda: old not in kit.engine.held)
    await kit.until(lambda: not (kit.tmp / "data/adapters" / old).exists())
    await refused(kit.ask("adapters/digits"), grpc.StatusCode.NOT_FOUND)
    await refused(kit.ask("adapters/digits/versions/1"), grpc.StatusCode.NOT_FOUND)
    kit.engine.pace.set()
    assert begun.text + "".join([each.text async for each in stream]) == kit.engine.says(old)
    await kit.until(lambda: not kit.engine.active)


async def test_an_adapter_that_is_made_again_after_its_deletion_is_preloaded_again(kit: Any) -> None:
    (digest,) = published(kit, 1)
    kit.registry.promote("acme", "digits", preload=True)
    await kit.start()
    await kit.until(lambda: digest in kit.engine.held)
    folder = kit.registry.versions["acme", "adapters/digits/versions/1"]
    kit.registry.delete("acme", "digits")
    await kit.until(lambda: digest not in kit.engine.held)
    kit.registry.versions["acme", "adapters/digits/versions/1"] = folder
    kit.registry.promote("acme", "digits", preload=True, production=1)
    await kit.until(lambda: digest in kit.engine.held)


async def test_a_deleted_version_without_alias_is_not_found(kit: Any) -> None:
    published(kit)
    await kit.start()
    assert (await kit.ask("adapters/digits/versions/2")).served_by.adapter_version == "adapters/digits/versions/2"
    del kit.registry.versions["acme", "adapters/digits/versions/2"]
    await refused(kit.ask("adapters/digits/versions/2"), grpc.StatusCode.NOT_FOUND)


async def test_what_the_stream_has_not_said_yet_is_asked_for(kit: Any) -> None:
    await kit.start()
    kit.registry.silent = True
    published(kit)
    assert (await kit.ask("adapters/digits")).served_by.adapter_version == "adapters/digits/versions/1"
    kit.registry.promote("acme", "digits", canary=2)
    assert (await kit.ask("adapters/digits@canary")).served_by.adapter_version == "adapters/digits/versions/2"


async def test_a_stream_that_lags_does_not_move_an_alias_back(kit: Any) -> None:
    published(kit)
    await kit.start()
    kit.registry.silent = True
    follower = kit.replica._follower
    late = kit.registry_message()
    kit.registry.promote("acme", "digits", production=2, blue=2)
    await kit.ask("adapters/digits@blue")
    follower._take(late)
    assert (await kit.ask("adapters/digits")).served_by.adapter_version == "adapters/digits/versions/2"


async def test_a_split_sends_a_share_to_the_canary_and_keys_stick(kit: Any) -> None:
    published(kit)
    kit.registry.promote("acme", "digits", canary=2, split=0.5)
    await kit.start()
    stub, sides = kit.stub(), {}
    for index in range(40):
        key = f"user-{index % 20}"
        response = await stub.Generate(kit.request("adapters/digits", routing_key=key, max_tokens=1))
        assert sides.setdefault(key, response.served_by.adapter_version) == response.served_by.adapter_version
    assert len(set(sides.values())) == 2


async def test_a_replica_serves_on_and_restarts_without_the_trainer(kit: Any) -> None:
    published(kit)
    await kit.start()
    await kit.ask("adapters/digits")
    state = kit.tmp / "data/registry.json"
    await kit.until(lambda: state.exists() and json.loads(state.read_bytes())["adapters"])
    await kit.ask("adapters/digits/versions/2")
    await kit.until(lambda: state.exists() and len(json.loads(state.read_bytes())["versions"]) == 2)
    await kit.registry.stop()
    await kit.ask("adapters/digits")
    await kit.stop()
    await kit.start()
    for model in ("adapters/digits", "adapters/digits@production", "adapters/digits/versions/2"):
        assert (await kit.ask(model)).text
    said = await refused(kit.ask("adapters/unheard-of"), grpc.StatusCode.UNAVAILABLE)
    assert "trainer" in said
    await refused(kit.ask("adapters/digits/versions/3"), grpc.StatusCode.UNAVAILABLE)

    await kit.registry.start()
    kit.registry.publish("acme", "digits", 3)
    kit.registry.promote("acme", "digits", production=3)

    async def follows() -> bool:
        return bool((await kit.ask("adapters/digits")).served_by.adapter_version == "adapters/digits/versions/3")

    await kit.until(follows)


async def test_a_broken_stream_goes_on_after_the_revision_seen_or_from_a_snapshot(kit: Any) -> None:
    published(kit)
    await kit.start()
    await kit.until(lambda: kit.registry.watches)
    assert kit.registry.watches == [0]
    await kit.registry.stop()
    kit.registry.promote("acme", "digits", production=2)
    await kit.registry.start()
    await kit.until(lambda: len(kit.registry.watches) > 1)
    assert kit.registry.watches[1] == 1

    await kit.registry.stop()
    kit.registry.revision, kit.registry.oldest = 90, 80
    kit.registry.promote("acme", "digits", blue=1)
    await kit.registry.start()
    await kit.until(lambda: kit.registry.watches[-2:] == [2, 0])
    await kit.ask("adapters/digits@blue")


async def test_a_registry_that_went_back_is_read_anew(kit: Any) -> None:
    published(kit)
    kit.registry.revision = 50
    await kit.start()
    await kit.ask("adapters/digits")
    kit.registry.silent = True
    kit.registry.revision = 3
    kit.registry.promote("acme", "digits", production=2)

    async def follows() -> bool:
        return bool((await kit.ask("adapters/digits")).served_by.adapter_version == "adapters/digits/versions/2")

    await kit.until(follows)


async def test_reports_say_what_is_held_and_how_it_goes(kit: Any) -> None:
    digest, _ = published(kit)
    await kit.start()
    for _ in range(3):
        await kit.ask("adapters/digits")

    def reported() -> list[Any]:
        return [row for report in kit.registry.reports for row in report.served_adapters]

    await kit.until(lambda: sum(row.answered for row in reported()) == 3)
    row = reported()[-1]
    assert (row.tenant, row.adapter_version, row.digest) == ("acme", "adapters/digits/versions/1", digest)
    assert any(each.latency_p95_ms > 0 for each in reported())
    report = kit.registry.reports[-1]
    assert (report.replica, report.address, report.model) == ("r1", kit.address, "models/tiny")
    assert not report.draining
    await kit.stop()
    assert kit.registry.reports[-1].draining


async def test_an_unloaded_version_stays_away_until_it_is_asked_for(kit: Any) -> None:
    digest, _ = published(kit)
    kit.registry.promote("acme", "digits", preload=True)
    await kit.start()
    await kit.until(lambda: digest in kit.engine.held)
    await kit.stub().UnloadAdapter(pb.UnloadAdapterRequest(adapter_version="adapters/digits/versions/1"))
    reports = len(kit.registry.reports)
    await kit.until(lambda: len(kit.registry.reports) > reports + 3)
    assert digest not in kit.engine.held
    await kit.ask("adapters/digits")
    assert digest in kit.engine.held
