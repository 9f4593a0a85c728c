"""What a channel adds to the calls made over it."""

# ruff: noqa: ANN401  # a servicer's context and a started call have no useful type

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from veneer_rpc.calls import serving_call
from veneer_rpc.channel import open_channel

SERVICE = "veneer.test.v1.EchoService"


async def report(request: StringValue, context: Any) -> StringValue:
    """Answers with what the callee sees of its caller."""
    call = serving_call()
    return StringValue(value=f"{call.request_id} {call.tenant} {call.time_remaining_s():.0f}")


async def test_a_call_made_in_a_call_carries_its_request_id_and_its_time(serve: Any) -> None:
    inner = await serve(unary_unary=report, settings={"unary_deadline_s": 100})
    forward = await inner.call("unary_unary")

    async def relay(request: StringValue, context: Any) -> StringValue:
        return await forward(request, timeout=float(request.value) if request.value else None)

    outer = await serve(unary_unary=relay)
    call = await outer.call("unary_unary")
    metadata = (("x-request-id", "one-id"),)
    assert (await call(StringValue(), metadata=metadata, timeout=20)).value == "one-id acme 20"
    assert (await call(StringValue(value="5"), metadata=metadata, timeout=20)).value == "one-id acme 5"
    assert (await call(StringValue(value="50"), metadata=metadata, timeout=20)).value == "one-id acme 20"


async def test_work_that_outlives_its_call_is_bound_to_no_deadline(serve: Any) -> None:
    inner = await serve(unary_unary=report, settings={"unary_deadline_s": 100})
    forward = await inner.call("unary_unary")
    tasks = []

    async def spawn(request: StringValue, context: Any) -> StringValue:
        async def later() -> str:
            await asyncio.sleep(0.4)
            return (await forward(StringValue())).value

        tasks.append(asyncio.create_task(later()))
        return request

    outer = await serve(unary_unary=spawn)
    await (await outer.call("unary_unary"))(StringValue(), metadata=(("x-request-id", "one-id"),), timeout=0.3)
    request_id, _, left_s = (await tasks[0]).split()
    assert (request_id != "one-id", left_s) == (True, "100")


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_the_credential_of_the_moment_is_sent_with_each_kind_of_call(serve: Any, kind: str) -> None:
    async def one(request: Any, context: Any) -> StringValue:
        return StringValue(value=dict(context.invocation_metadata())["authorization"])

    async def stream(request: Any, context: Any) -> AsyncIterator[StringValue]:
        yield await one(request, context)

    may_write = asyncio.Event()
    may_write.set()

    async def requests() -> AsyncIterator[StringValue]:
        await may_write.wait()
        yield StringValue()

    running = await serve(**{kind: one if kind.endswith("unary") else stream})
    credentials = iter(["vnr_user", "vnr_user", "vnr_nobody"])
    channel = await running.channel(lambda: next(credentials))
    method = "".join(word.title() for word in kind.split("_"))
    call = getattr(channel, kind)(f"/{SERVICE}/{method}", StringValue.SerializeToString, StringValue.FromString)

    async def ask() -> list[str]:
        started = call(StringValue() if kind.startswith("unary") else requests())
        if kind.endswith("unary"):
            return [(await started).value]
        return [answer.value async for answer in started]

    assert await ask() == await ask() == ["Bearer vnr_user"]
    may_write.clear()  # grpc tells a bare INTERNAL where it writes while it is refused
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    may_write.set()


@pytest.mark.parametrize("target", ["veneer.example:443", "10.0.0.1:443", "dns:///veneer.example:443"])
def test_no_credential_crosses_a_network_in_clear_text(target: str) -> None:
    with pytest.raises(ValueError, match="without TLS"):
        open_channel(target, "vnr_user")
