# ruff: noqa: ANN401  # the kit is the conftest's
"""Damaged adapters, dead engines, crowds and stops."""

import asyncio
import json
import shutil
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from veneer.inference.v1.inference_service_pb2 import LoadAdapterRequest
from veneer_inference.ports import EngineError

SERVICE = "veneer.inference.v1.InferenceService"


async def refused(call: Any, code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value.details()
    return str(caught.value.details())


async def serving(kit: Any) -> bool:
    async with grpc.aio.insecure_channel(kit.address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        status = (await health_pb2_grpc.HealthStub(channel).Check(request)).status
        return bool(status == health_pb2.HealthCheckResponse.SERVING)


def published(kit: Any) -> str:
    digest = kit.registry.publish("acme", "digits", 1)
    kit.registry.promote("acme", "digits", production=1)
    return str(digest)


async def test_requests_at_once_share_one_download_and_one_load(kit: Any) -> None:
    digest = published(kit)
    await kit.start()
    kit.engine.load_pace.clear()
    asking = [asyncio.create_task(kit.ask("adapters/digits")) for _ in range(10)]
    await kit.until(lambda: kit.registry.downloads)
    await asyncio.sleep(0.05)
    asking[0].cancel()  # what the first has begun is the others' too
    kit.engine.load_pace.set()
    answers = await asyncio.gather(*asking[1:])
    assert {each.served_by.adapter_digest for each in answers} == {digest}
    assert kit.registry.downloads == [("acme", "adapters/digits/versions/1")]
    assert kit.engine.loads == [digest]


async def test_requests_at_once_for_a_version_by_its_number_share_one_download(kit: Any) -> None:
    published(kit)
    kit.registry.publish("acme", "digits", 2)
    await kit.start()
    kit.registry.download_pace.clear()
    asking = [asyncio.create_task(kit.ask("adapters/digits/versions/2")) for _ in range(5)]
    await kit.until(lambda: kit.registry.downloads)
    await asyncio.sleep(0.1)
    asking[0].cancel()
    kit.registry.download_pace.set()
    answers = await asyncio.gather(*asking[1:])
    assert {each.served_by.adapter_version for each in answers} == {"adapters/digits/versions/2"}
    # Version 1 is production's: the replica may have begun to follow that meanwhile.
    assert kit.registry.downloads.count(("acme", "adapters/digits/versions/2")) == 1


@pytest.mark.parametrize("damage", ["tensors", "contract", "missing", "config"])
async def test_a_tampered_folder_is_fetched_again(kit: Any, damage: str) -> None:
    digest = published(kit)
    await kit.start()
    await kit.ask("adapters/digits")
    await kit.stop()
    folder = kit.tmp / "data/adapters" / digest
    tensors = folder / "adapter_model.safetensors"
    if damage == "tensors":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    elif damage == "config":
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 400}))
    elif damage == "contract":
        contract = json.loads((folder / "processing_contract.json").read_bytes())
        (folder / "processing_contract.json").write_text(json.dumps(contract | {"max_pixels": 65_536}))
    else:
        (folder / "processing_contract.json").unlink()
    await kit.start()
    response = await kit.ask("adapters/digits")
    assert response.text == kit.engine.says(digest)
    assert len(kit.registry.downloads) == 2


async def test_a_version_that_is_not_what_the_registry_says_is_refused_with_the_reason(kit: Any) -> None:
    published(kit)
    config = kit.registry.versions["acme", "adapters/digits/versions/1"] / "adapter_config.json"
    config.write_text(json.dumps({"r": 2, "lora_alpha": 400}))
    await kit.start()
    assert "digest" in await refused(kit.ask("adapters/digits"), grpc.StatusCode.FAILED_PRECONDITION)
    assert not list((kit.tmp / "data/adapters").iterdir())
    assert (await kit.ask("models/tiny")).text


async def test_an_adapter_that_the_engine_refuses_is_refused_with_its_reasons(kit: Any) -> None:
    digest = published(kit)
    await kit.start()
    kit.engine.refuse[digest] = EngineError("ADAPTER_INVALID", ["tensor x is not finite", "r is 4096"])
    said = await refused(kit.ask("adapters/digits"), grpc.StatusCode.FAILED_PRECONDITION)
    assert "tensor x is not finite; r is 4096" in said
    downloads = len(kit.registry.downloads)
    assert downloads == 2
    await refused(kit.ask("adapters/digits"), grpc.StatusCode.FAILED_PRECONDITION)
    assert len(kit.registry.downloads) == downloads  # the refusal is remembered for a while


async def test_another_processing_contract_is_refused_with_the_differences(kit: Any) -> None:
    published(kit)
    path = kit.registry.versions["acme", "adapters/digits/versions/1"] / "processing_contract.json"
    contract = json.loads(path.read_bytes()) | {"template_digest": "ab" * 32}
    path.write_text(json.dumps(contract))
    kit.registry.promote("acme", "digits", production=1)  # with the digest of what is there now
    await kit.start()
    said = await refused(kit.ask("adapters/digits"), grpc.StatusCode.FAILED_PRECONDITION)
    assert "template_digest" in said


async def test_a_version_that_the_engine_dropped_is_loaded_again(kit: Any) -> None:
    digest = published(kit)
    await kit.start()
    await kit.ask("adapters/digits")
    del kit.engine.held[digest]
    assert (await kit.ask("adapters/digits")).text == kit.engine.says(digest)
    assert kit.engine.loads == [digest, digest]
    del kit.engine.held[digest]
    await kit.stub().LoadAdapter(LoadAdapterRequest(adapter="adapters/digits"))
    assert digest in kit.engine.held
    kit.engine.next_errors.append(EngineError("ADAPTER_NOT_LOADED", [digest]))  # between its load and its use
    assert (await kit.ask("adapters/digits")).text == kit.engine.says(digest)


async def test_the_engines_death_ends_its_answers_and_another_heals_it(kit: Any) -> None:
    digest = published(kit)
    await kit.start()
    await kit.ask("adapters/digits")
    assert await serving(kit)
    dead = kit.engine
    dead.pace.clear()
    stream = kit.stub().StreamGenerate(kit.stream_request("adapters/digits"))
    await stream.read()
    begin = asyncio.Event()
    start_engine = kit.start_engine

    async def start_later() -> Any:
        await begin.wait()
        return await start_engine()

    kit.replica._keeper._start_engine = start_later
    dead.die()
    await refused(stream.read(), grpc.StatusCode.UNAVAILABLE)

    async def not_serving() -> bool:
        return not await serving(kit)

    await kit.until(not_serving)
    await refused(kit.ask("models/tiny"), grpc.StatusCode.UNAVAILABLE)
    begin.set()
    await kit.until(lambda: serving(kit))
    assert dead.closed
    assert (await kit.ask("adapters/digits")).text == kit.engine.says(digest)
    assert kit.engine is not dead
    assert kit.engine.loads == [digest]


async def test_an_engine_that_does_not_start_is_tried_again_after_the_first(kit: Any) -> None:
    await kit.start()
    start_engine, failures = kit.start_engine, [EngineError("ENGINE_GONE", ["no memory"])] * 2

    async def fail_first() -> Any:
        if failures:
            raise failures.pop()
        return await start_engine()

    kit.replica._keeper._start_engine = fail_first
    kit.engine.die()
    await kit.until(lambda: len(kit.engines) == 2)
    await kit.until(lambda: serving(kit))


async def test_a_first_engine_that_gives_no_token_ends_the_start(kit: Any) -> None:
    async def start() -> Any:
        engine = await kit.start_engine()
        engine.next_errors.append(EngineError("ENGINE_GONE", ["broken"]))
        return engine

    with pytest.raises(EngineError, match="broken"):
        await kit.start(start)
    assert kit.engine.closed


async def test_a_stop_lets_streams_finish_and_takes_no_more(kit: Any) -> None:
    await kit.start()
    kit.engine.pace.clear()
    stream = kit.stub().StreamGenerate(kit.stream_request("models/tiny"))
    begun = await stream.read()
    stopping = asyncio.create_task(kit.replica.stop())
    await kit.until(lambda: kit.registry.reports and kit.registry.reports[-1].draining)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await kit.ask("models/tiny")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    kit.engine.pace.set()
    assert begun.text + "".join([each.text async for each in stream]) == kit.engine.says("")
    await stopping


async def test_a_stop_cuts_what_takes_longer_than_the_grace(kit: Any) -> None:
    await kit.start(grace_s=0.2)
    kit.engine.pace.clear()
    stream = kit.stub().StreamGenerate(kit.stream_request("models/tiny"))
    await stream.read()
    await kit.replica.stop()
    with pytest.raises(grpc.aio.AioRpcError):
        await stream.read()
    assert kit.engine.active == []


async def test_prompts_beyond_the_bound_are_refused(kit: Any) -> None:
    await kit.start(max_prompts_waiting=1, prompt_threads=1)
    stub, png = kit.stub(), kit.png(900, 900)
    answers = await asyncio.gather(
        *(stub.Generate(kit.request("models/tiny", png)) for _ in range(6)), return_exceptions=True
    )
    codes = {each.code() for each in answers if isinstance(each, grpc.aio.AioRpcError)}
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert any(not isinstance(each, BaseException) for each in answers)
    assert (await kit.ask("models/tiny")).text


async def test_the_disk_is_bounded_and_what_is_held_stays(kit: Any) -> None:
    digests = [kit.registry.publish("acme", "digits", version) for version in range(1, 6)]
    kit.registry.promote("acme", "digits")  # no alias: nothing is loaded ahead
    await kit.start(adapter_disk_bytes=1)
    for version in range(1, 6):
        await kit.ask(f"adapters/digits/versions/{version}")
        if version < 5:
            kit.engine.held.clear()  # as if the engine had made room
    left = [each.name for each in (kit.tmp / "data/adapters").iterdir()]
    assert left == [digests[-1]]


async def test_a_half_downloaded_adapter_leaves_nothing(kit: Any) -> None:
    published(kit)
    half = kit.tmp / "data/adapters/.new-abc"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    folder = kit.registry.versions["acme", "adapters/digits/versions/1"]
    aside = folder.with_name("aside")
    await kit.start()
    assert not half.exists()
    shutil.copytree(folder, aside)
    (folder / "adapter_model.safetensors").unlink()
    said = await refused(kit.ask("adapters/digits"), grpc.StatusCode.FAILED_PRECONDITION)
    assert "adapter_model.safetensors" in said
    assert not list((kit.tmp / "data/adapters").iterdir())
