# ruff: noqa: ANN401  # the kit is the conftest's
"""Every method on a live server: what it gives, and what it refuses."""

import asyncio
import zlib
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from veneer.dataset.v1.conversation_pb2 import Message, Part, Picture, Role
from veneer.inference.v1 import inference_pb2
from veneer.inference.v1 import inference_service_pb2 as pb
from veneer.trainer.v1 import model_pb2
from veneer_inference.ports import EngineError
from veneer_rpc.delegation import DelegationSigner, new_key_pair

SERVICE = "veneer.inference.v1.InferenceService"


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    found = {}
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for each in status_pb2.Status.FromString(value).details:
                for kind in ("ErrorInfo", "BadRequest", "RetryInfo"):
                    message = getattr(error_details_pb2, kind)()
                    if each.Unpack(message):
                        found[kind] = message
    return found


async def refused(call: Any, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value.details()
    assert "ErrorInfo" in details(caught.value)
    return caught.value


async def test_generate_answers_with_the_base(kit: Any) -> None:
    await kit.start()
    response = await kit.ask("models/tiny", top_logprobs=2)
    assert response.text == "base 你好，世界 😀 the end"
    assert response.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert response.token_ids[-1] == 151645
    assert response.usage.answer_tokens == len(response.token_ids) == len(response.logprobs)
    assert response.usage.cached_tokens == 2
    assert b"".join(each.token for each in response.logprobs).decode() == response.text + "<|im_end|>"
    assert [len(each.top) for each in response.logprobs] == [2] * len(response.token_ids)
    served = response.served_by
    assert (served.model, served.adapter_version, served.adapter_digest) == ("models/tiny", "", "")
    assert (served.model_digest, served.replica, served.dtype) == (kit.base_digest, "r1", model_pb2.DTYPE_FLOAT32)
    timings = response.timings
    assert 0 < timings.queued.ToNanoseconds() <= timings.time_to_first_token.ToNanoseconds()
    assert timings.time_to_first_token.ToNanoseconds() <= timings.total.ToNanoseconds()


async def test_a_stream_is_the_same_answer_in_pieces(kit: Any) -> None:
    await kit.start()
    whole = await kit.ask("models/tiny")
    pieces = [each async for each in kit.stub().StreamGenerate(kit.stream_request("models/tiny"))]
    assert "".join(each.text for each in pieces) == whole.text
    assert [each for piece in pieces for each in piece.token_ids] == whole.token_ids
    assert [each.finish_reason for each in pieces[:-1]] == [0] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == inference_pb2.FINISH_REASON_STOP
    assert [each.HasField("served_by") for each in pieces] == [True, *[False] * (len(pieces) - 2), True]
    assert [each.usage.answer_tokens for each in pieces] == list(range(1, len(pieces) + 1))


async def test_the_sampling_reaches_the_engine(kit: Any) -> None:
    await kit.start()
    await kit.ask("models/tiny", max_tokens=3, temperature=0.5, top_p=0.9, top_k=4, repetition_penalty=1.5, seed=7)
    sampling = kit.engine.prompts[-1][3]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.5, 0.9, 4)
    assert (sampling.repetition_penalty, sampling.seed, sampling.logprobs) == (1.5, 7, None)
    assert sampling.stop_ids == (151645,)


async def test_max_tokens_cuts_and_the_default_gives_way_to_the_context(kit: Any) -> None:
    await kit.start()
    response = await kit.ask("models/tiny", max_tokens=2)
    assert response.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert len(response.token_ids) == 2
    await kit.stub().Generate(kit.request("models/tiny", "word " * 3800))
    prompt, sampling = kit.engine.prompts[-1][2:]
    assert len(prompt.ids_T) + sampling.max_tokens == 4096
    error = await refused(
        kit.stub().Generate(kit.request("models/tiny", "word " * 3800, max_tokens=512)),
        grpc.StatusCode.INVALID_ARGUMENT,
    )
    assert details(error)["BadRequest"].field_violations[0].field == "sampling.max_tokens"
    await refused(kit.stub().Generate(kit.request("models/tiny", "word " * 4100)), grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_stop_text_ends_the_answer_and_the_engines_work(kit: Any) -> None:
    await kit.start()
    response = await kit.ask("models/tiny", stop=["世界"])
    assert response.text == "base 你好，"
    assert response.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert kit.engine.cancelled == 1
    assert kit.engine.active == []


async def test_pictures_come_inline_or_by_digest(kit: Any) -> None:
    await kit.start()
    png = kit.png(64, 96)
    digest = kit.datasets.put(kit.tokens["acme"], png)
    inline = await kit.stub().Generate(kit.request("models/tiny", png, "What?"))
    blob = await kit.stub().Generate(kit.request("models/tiny", Picture(blob=digest), "What?"))
    assert inline.usage.visual_tokens == blob.usage.visual_tokens == 6
    first, second = (each[2] for each in kit.engine.prompts[-2:])
    assert first.picture_digests == second.picture_digests == (digest,)
    assert (first.patches_N_P == second.patches_N_P).all()
    assert first.grids_n_3.tolist() == [[1, 6, 4]]
    error = await refused(
        kit.stub("other").Generate(kit.request("models/tiny", Picture(blob=digest))), grpc.StatusCode.NOT_FOUND
    )
    assert "prompt.messages[0].parts[0].picture.blob" in str(error.details())


async def test_a_blob_over_the_bound_and_a_damaged_one_are_refused(kit: Any) -> None:
    await kit.start(max_picture_bytes=20_000)
    large = kit.datasets.put(kit.tokens["acme"], kit.png(200, 200))
    damaged = kit.datasets.put(kit.tokens["acme"], kit.png(8, 8))
    kit.datasets.blobs[f"Bearer {kit.tokens['acme']}", damaged] += b"x"
    for digest, code, reason in (
        (large, grpc.StatusCode.RESOURCE_EXHAUSTED, "PICTURE_TOO_LARGE"),
        (damaged, grpc.StatusCode.DATA_LOSS, "BLOB_DAMAGED"),
    ):
        error = await refused(kit.stub().Generate(kit.request("models/tiny", Picture(blob=digest))), code)
        assert details(error)["ErrorInfo"].reason == reason
    await kit.datasets.server.stop(0)
    error = await refused(
        kit.stub().Generate(kit.request("models/tiny", Picture(blob=large))), grpc.StatusCode.UNAVAILABLE
    )
    assert details(error)["ErrorInfo"].reason == "DATASET_UNAVAILABLE"


async def test_a_bound_on_pixels_is_the_bases_alone(kit: Any) -> None:
    kit.registry.publish("acme", "small", 1, max_pixels=4096)
    kit.registry.promote("acme", "small", production=1)
    await kit.start()
    request = kit.request("models/tiny", kit.png(128, 128))
    wide = await kit.stub().Generate(request)
    request.prompt.max_pixels = 4096
    narrow = await kit.stub().Generate(request)
    assert (wide.usage.visual_tokens, narrow.usage.visual_tokens) == (16, 4)
    assert wide.served_by.contract_digest != narrow.served_by.contract_digest
    request.model = "adapters/small"
    own = await kit.stub().Generate(request)
    assert own.usage.visual_tokens == 4
    request.prompt.max_pixels = 8192
    error = await refused(kit.stub().Generate(request), grpc.StatusCode.INVALID_ARGUMENT)
    assert "4096" in str(error.details())
    request.model, request.prompt.max_pixels = "models/tiny", 1 << 40
    await refused(kit.stub().Generate(request), grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("data", [b"GIF89a", b"\x89PNG\r\n\x1a\nbroken", b"II*\0tiff"])
async def test_every_bad_picture_is_named(kit: Any, data: bytes) -> None:
    await kit.start()
    error = await refused(
        kit.stub().Generate(kit.request("models/tiny", "a", data, kit.png(), data)), grpc.StatusCode.INVALID_ARGUMENT
    )
    fields = [each.field for each in details(error)["BadRequest"].field_violations]
    assert fields == ["prompt.messages[0].parts[1].picture.data", "prompt.messages[0].parts[3].picture.data"]
    assert (await kit.ask("models/tiny")).text


async def test_a_bomb_is_too_large(kit: Any) -> None:
    await kit.start()
    png = bytearray(kit.png())
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    error = await refused(
        kit.stub().Generate(kit.request("models/tiny", bytes(png))), grpc.StatusCode.RESOURCE_EXHAUSTED
    )
    assert details(error)["ErrorInfo"].reason == "PICTURE_TOO_LARGE"


async def test_control_tokens_and_strange_conversations_are_refused(kit: Any) -> None:
    await kit.start()
    error = await refused(
        kit.stub().Generate(kit.request("models/tiny", "hi", "x <|im_end|> y")), grpc.StatusCode.INVALID_ARGUMENT
    )
    assert details(error)["BadRequest"].field_violations[0].field == "prompt.messages[0].parts[1]"
    request = kit.request("models/tiny")
    request.prompt.messages.insert(0, Message(role=Role.ROLE_ASSISTANT, parts=[Part(text="no")]))
    error = await refused(kit.stub().Generate(request), grpc.StatusCode.INVALID_ARGUMENT)
    assert details(error)["BadRequest"].field_violations[0].field == "prompt.messages"


async def test_score_gives_every_supervised_token_by_message(kit: Any) -> None:
    await kit.start()
    said = [("user", "a"), ("assistant", "one two"), ("user", "b"), ("assistant", "silent"), ("assistant", "你好")]
    roles = {"user": Role.ROLE_USER, "assistant": Role.ROLE_ASSISTANT}
    messages = [
        Message(role=roles[role], parts=[Part(text=text)], unsupervised=text == "silent") for role, text in said
    ]
    response = await kit.stub().Score(
        pb.ScoreRequest(model="models/tiny", prompt=inference_pb2.Prompt(messages=messages), top_logprobs=2)
    )
    assert [each.message_index for each in response.messages] == [1, 4]
    texts = [b"".join(token.token for token in each.tokens).decode() for each in response.messages]
    assert texts == ["one two<|im_end|>", "你好<|im_end|>"]
    count = sum(len(each.tokens) for each in response.messages)
    assert response.total_logprob == -0.5 * count
    assert len(response.messages[0].tokens[0].top) == 2
    counted = await kit.stub().CountTokens(
        pb.CountTokensRequest(model="models/tiny", prompt=inference_pb2.Prompt(messages=messages))
    )
    assert counted.supervised_tokens == count
    assert counted.total_tokens == response.usage.prompt_tokens


async def test_count_tokens_counts_pictures(kit: Any) -> None:
    await kit.start()
    request = pb.CountTokensRequest(model="models/tiny", prompt=kit.prompt(kit.png(64, 64), "What is it?"))
    counted = await kit.stub().CountTokens(request)
    answered = await kit.stub().Generate(kit.request("models/tiny", kit.png(64, 64), "What is it?"))
    assert (counted.visual_tokens, counted.supervised_tokens) == (4, 0)
    assert counted.total_tokens == answered.usage.prompt_tokens


async def test_get_model_tells_of_the_base(kit: Any) -> None:
    await kit.start()
    model = await kit.stub().GetModel(pb.GetModelRequest())
    assert (model.model, model.digest, model.engine) == ("models/tiny", kit.base_digest, "fake")
    assert (model.context_length, model.kv_capacity_tokens, model.adapter_slots) == (4096, 4096, 8)
    assert model.contract.model_digest == kit.base_digest
    assert len(model.contract.digest) == 64


async def test_adapters_are_loaded_listed_and_unloaded(kit: Any) -> None:
    for version in (1, 2, 3):
        kit.registry.publish("acme", "digits", version)
    kit.registry.promote("acme", "digits", production=2, canary=3)
    await kit.start()
    stub = kit.stub()
    loaded = await stub.LoadAdapter(pb.LoadAdapterRequest(adapter="adapters/digits@canary"))
    assert loaded.adapter_version == "adapters/digits/versions/3"
    assert loaded.residence == inference_pb2.RESIDENCE_HOST
    assert loaded.HasField("load_time")
    assert not loaded.HasField("last_use_time")
    await stub.LoadAdapter(pb.LoadAdapterRequest(adapter="adapters/digits/versions/1"))
    await kit.ask("adapters/digits")
    names, token = [], ""
    while True:
        page = await stub.ListLoadedAdapters(pb.ListLoadedAdaptersRequest(page_size=1, page_token=token))
        names += [(each.adapter_version[-1], each.HasField("last_use_time")) for each in page.loaded_adapters]
        token = page.next_page_token
        if not token:
            break
    assert names == [("1", False), ("2", True), ("3", False)]
    assert not (await kit.stub("other").ListLoadedAdapters(pb.ListLoadedAdaptersRequest())).loaded_adapters
    await stub.UnloadAdapter(pb.UnloadAdapterRequest(adapter_version="adapters/digits/versions/1"))
    assert len(kit.engine.held) == 2
    await refused(
        stub.UnloadAdapter(pb.UnloadAdapterRequest(adapter_version="adapters/digits/versions/1")),
        grpc.StatusCode.NOT_FOUND,
    )
    assert (await kit.ask("adapters/digits/versions/1")).served_by.adapter_version == "adapters/digits/versions/1"


async def test_unknown_names_are_told_what_there_is(kit: Any) -> None:
    kit.registry.publish("acme", "digits", 1)
    kit.registry.promote("acme", "digits", production=1)
    await kit.start()
    for model, told in (
        ("adapters/digitz", "adapters/digits"),
        ("adapters/digits@blue", "production"),
        ("adapters/digits/versions/9", "production = 1"),
        ("models/large", "models/tiny"),
    ):
        error = await refused(kit.ask(model), grpc.StatusCode.NOT_FOUND)
        assert told in str(error.details())
    error = await refused(kit.ask("adapters/digits", "other"), grpc.StatusCode.NOT_FOUND)
    assert "there is: none" in str(error.details())


async def test_two_tenants_with_one_name_see_their_own(kit: Any) -> None:
    digests = {}
    for tenant in ("acme", "other"):
        digests[tenant] = kit.registry.publish(tenant, "digits", 1)
        kit.registry.promote(tenant, "digits", production=1)
    await kit.start()
    for tenant, digest in digests.items():
        response = await kit.ask("adapters/digits", tenant)
        assert response.served_by.adapter_digest == digest
        assert response.text.startswith(digest[:12])
        assert kit.engine.prompts[-1][0] == tenant


async def test_two_tenants_with_one_adapter_do_not_take_it_from_each_other(kit: Any) -> None:
    digest = kit.registry.publish("acme", "digits", 1)
    kit.registry.share("acme", "other", "digits", 1)
    for tenant in ("acme", "other"):
        kit.registry.promote(tenant, "digits", production=1)
    await kit.start()
    await kit.ask("adapters/digits")
    assert not (await kit.stub("other").ListLoadedAdapters(pb.ListLoadedAdaptersRequest())).loaded_adapters
    await kit.ask("adapters/digits", "other")
    unload = pb.UnloadAdapterRequest(adapter_version="adapters/digits/versions/1")
    await kit.stub("other").UnloadAdapter(unload)
    assert digest in kit.engine.held
    assert not (await kit.stub("other").ListLoadedAdapters(pb.ListLoadedAdaptersRequest())).loaded_adapters
    assert len((await kit.stub().ListLoadedAdapters(pb.ListLoadedAdaptersRequest())).loaded_adapters) == 1
    await kit.stub().UnloadAdapter(unload)
    assert digest not in kit.engine.held


async def test_without_a_good_token_there_is_nothing_but_health(kit: Any) -> None:
    await kit.start()
    other_private, _ = new_key_pair()
    bad = [
        None,
        "vnr_wrong",
        DelegationSigner(other_private).sign("w", "acme", ["inference"], ["user"]),
        DelegationSigner(kit.private_pem).sign("w", "acme", ["dataset"], ["user"]),
    ]
    async with grpc.aio.insecure_channel(kit.address) as channel:
        methods = pb.DESCRIPTOR.services_by_name["InferenceService"].methods
        assert len(methods) == 8
        for method in methods:
            for token in bad:
                metadata = (("authorization", f"Bearer {token}"),) if token else ()
                path = f"/{SERVICE}/{method.name}"
                kind = channel.unary_stream if method.server_streaming else channel.unary_unary
                call = kind(path)(b"", metadata=metadata)
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(channel)
        status = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert status.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_worker_asks_for_a_tenant_by_delegation(kit: Any) -> None:
    digest = kit.registry.publish("other", "digits", 1)
    await kit.start()
    signer = DelegationSigner(kit.private_pem)
    stub = kit.stub(token=signer.sign("worker-1", "other", ["dataset", "inference"], ["user"]))
    response = await stub.Generate(kit.request("adapters/digits/versions/1"))  # no alias points at it
    assert response.served_by.adapter_digest == digest


@pytest.mark.parametrize(
    ("reason", "code", "retry"),
    [
        ("QUEUE_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED, True),
        ("READER_TOO_SLOW", grpc.StatusCode.RESOURCE_EXHAUSTED, True),
        ("TOO_LONG", grpc.StatusCode.INVALID_ARGUMENT, False),
        ("SCHEMA_UNSUPPORTED", grpc.StatusCode.INVALID_ARGUMENT, False),
        ("ENGINE_GONE", grpc.StatusCode.UNAVAILABLE, True),
        ("NEVER_HEARD_OF", grpc.StatusCode.INTERNAL, False),
    ],
)
async def test_what_the_engine_refuses(kit: Any, reason: str, code: grpc.StatusCode, retry: bool) -> None:
    await kit.start()
    kit.engine.next_errors.append(EngineError(reason, ["for a test"], 3.5 if retry else None))
    found = details(await refused(kit.ask("models/tiny"), code))
    assert ("RetryInfo" in found) == retry
    if retry:
        assert found["RetryInfo"].retry_delay.ToMilliseconds() == 3500
    assert (await kit.ask("models/tiny")).text


async def test_a_cancel_a_deadline_and_a_lost_connection_reach_the_engine(kit: Any) -> None:
    await kit.start()
    kit.engine.pace.clear()
    engine = kit.engine

    stream = kit.stub().StreamGenerate(kit.stream_request("models/tiny"))
    await stream.read()
    assert engine.active == [""]
    stream.cancel()
    await kit.until(lambda: not engine.active)
    assert engine.cancelled == 1

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await kit.stub().Generate(kit.request("models/tiny"), timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await kit.until(lambda: not engine.active)
    assert engine.cancelled == 2

    stream = kit.stub().StreamGenerate(kit.stream_request("models/tiny"))
    await stream.read()
    await kit.channels[-1].close()
    await kit.until(lambda: not engine.active)
    assert engine.cancelled == 3
    with pytest.raises(asyncio.CancelledError):
        await stream.read()


async def test_a_reader_that_stops_holds_the_engines_steps_back_and_is_cut_off(kit: Any) -> None:
    await kit.start()
    engine = kit.engine
    engine.flood = 5000
    stream = kit.stub().StreamGenerate(kit.stream_request("models/tiny"))
    await stream.read()
    seen = -1
    while seen != engine.steps:  # until the connection takes no more
        seen = engine.steps
        await asyncio.sleep(0.3)
    assert 0 < seen < 5000
    engine.too_slow = True

    async def rest() -> None:
        while await stream.read() is not grpc.aio.EOF:
            pass

    error = await refused(rest(), grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert details(error)["ErrorInfo"].reason == "READER_TOO_SLOW"


async def test_far_too_much_is_refused_and_the_process_lives(kit: Any) -> None:
    await kit.start()
    pictures = [Picture(blob="ab" * 32)] * 100
    error = await refused(
        kit.stub().Generate(kit.request("models/tiny", *pictures)), grpc.StatusCode.RESOURCE_EXHAUSTED
    )
    assert details(error)["ErrorInfo"].reason == "TOO_MANY_PICTURES"
    await refused(kit.ask("models/tiny", max_tokens=10**9, temperature=-1), grpc.StatusCode.INVALID_ARGUMENT)
    assert (await kit.ask("models/tiny")).text
