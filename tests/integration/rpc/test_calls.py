"""Every guarantee of the interceptor, over a real connection, for all four kinds of call."""

# ruff: noqa: ANN401  # a servicer's context and a started call have no useful type

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from veneer_rpc import errors, status
from veneer_rpc.calls import current_call, serving_call
from veneer_rpc.channel import open_channel
from veneer_rpc.errors import InvalidArgument, NotFound, ResourceExhausted, Violation, invalid

KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]


async def unary_unary(request: StringValue, context: Any) -> StringValue:
    return StringValue(value=f"{serving_call().tenant} {request.value}")


async def unary_stream(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
    for part in request.value.split():
        yield StringValue(value=f"{serving_call().tenant} {part}")


async def stream_unary(requests: AsyncIterator[StringValue], context: Any) -> StringValue:
    parts = [request.value async for request in requests]
    return StringValue(value=f"{serving_call().tenant} {' '.join(parts)}")


async def stream_stream(requests: AsyncIterator[StringValue], context: Any) -> AsyncIterator[StringValue]:
    async for request in requests:
        yield StringValue(value=f"{serving_call().tenant} {request.value}")


ECHO = {"unary_unary": unary_unary, "unary_stream": unary_stream, "stream_unary": stream_unary,
        "stream_stream": stream_stream}  # fmt: skip


async def two() -> AsyncIterator[StringValue]:
    for value in ("a", "b"):
        yield StringValue(value=value)


async def endless() -> AsyncIterator[StringValue]:
    await asyncio.sleep(3600)
    yield StringValue()


def start(call: Any, kind: str, request: Any = None, **kwargs: Any) -> Any:
    if kind.startswith("unary"):
        return call(request or StringValue(value="a b"), **kwargs)
    return call(request or two(), **kwargs)


async def answers(started: Any, kind: str) -> list[str]:
    if kind.endswith("unary"):
        return [(await started).value]
    return [response.value async for response in started]


async def failure(started: Any, kind: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answers(started, kind)
    return caught.value


async def to_the_end(request: Any) -> None:
    """Reads every request, if there are several: an aio client that is still writing may report INTERNAL."""
    if not isinstance(request, StringValue):
        async for _ in request:
            pass


def raising(kind: str, error: Exception) -> Any:
    """Returns a servicer's method that fails; a streaming one after its first response."""

    async def one(request: Any, context: Any) -> StringValue:
        await to_the_end(request)
        raise error

    async def stream(request: Any, context: Any) -> AsyncIterator[StringValue]:
        await to_the_end(request)
        yield StringValue(value="first")
        raise error

    return one if kind.endswith("unary") else stream


def said(caplog: Any) -> list[str]:
    """What was logged, but for gRPC's queue that finds the loop of an earlier test closed: it has one for all loops."""
    return [text for text in caplog.messages if "PollerCompletionQueue" not in text]


@pytest.mark.parametrize("kind", KINDS)
async def test_each_kind_of_call_is_served_for_its_tenant(serve: Any, kind: str, lines: Any) -> None:
    running = await serve(**ECHO)
    started = start(await running.call(kind), kind, metadata=(("x-request-id", "my-id-1"),))
    expected = ["acme a b"] if kind.endswith("unary") else ["acme a", "acme b"]
    assert await answers(started, kind) == expected
    assert dict(await started.trailing_metadata())["x-request-id"] == "my-id-1"
    await running.idle()
    (line,) = [line for line in lines if line["event"] == "call"]
    assert line.pop("duration_ms") > 0
    assert line.pop("peer").startswith("ipv4:127.0.0.1:")
    method = "".join(word.title() for word in kind.split("_"))
    assert line == {"event": "call", "log_level": "info", "method": f"veneer.test.v1.EchoService/{method}",
                    "code": "OK", "tenant": "acme", "request_id": "my-id-1"}  # fmt: skip


async def test_a_servicer_may_write_to_the_context_itself(serve: Any) -> None:
    async def write(request: StringValue, context: Any) -> None:
        await context.write(request)
        context.set_trailing_metadata((("x-own", "kept"),))

    running = await serve(unary_stream=write)
    started = start(await running.call("unary_stream"), "unary_stream")
    assert await answers(started, "unary_stream") == ["a b"]
    assert {"x-own", "x-request-id"} <= dict(await started.trailing_metadata()).keys()


async def test_an_unfit_request_id_is_replaced(serve: Any, lines: Any) -> None:
    running = await serve(**ECHO)
    started = (await running.call("unary_unary"))(StringValue(), metadata=(("x-request-id", "a b {}"),))
    await started
    assert len(dict(await started.trailing_metadata())["x-request-id"]) == 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "TOKEN_MISSING"),
        ("vnr_user", "TOKEN_MALFORMED"),
        ("Basic vnr_user", "TOKEN_MALFORMED"),
        ("Bearer ", "TOKEN_MALFORMED"),
        ("Bearer something", "TOKEN_MALFORMED"),
        ("Bearer vnr_" + "x" * 5000, "TOKEN_MALFORMED"),
        ("Bearer vnr_users", "TOKEN_UNKNOWN"),
        ("Bearer vnr_expired", "TOKEN_EXPIRED"),
        ("Bearer vnd1.e30.e30", "DELEGATION_FOREIGN"),
    ],
)
async def test_no_call_without_a_valid_token(
    serve: Any, kind: str, header: str | None, reason: str, lines: Any
) -> None:
    running = await serve(**ECHO)
    metadata = (("authorization", header),) if header is not None else ()
    channel = await running.stack.enter_async_context(open_channel(running.address))
    method = "".join(word.title() for word in kind.split("_"))
    call = getattr(channel, kind)(
        f"/veneer.test.v1.EchoService/{method}", StringValue.SerializeToString, StringValue.FromString
    )
    request = None if kind.startswith("unary") else endless()  # refused without a message
    error = await failure(start(call, kind, request, metadata=metadata, timeout=5), kind)
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert status.from_rpc_error(error).reason == reason
    assert "vnr_user" not in str(lines)


async def test_a_delegation_acts_for_its_tenant(serve: Any, credentials: Any, lines: Any) -> None:
    running = await serve(**ECHO)
    good = credentials.signer.sign("worker-1", "globex", ["dataset"], ["user"])
    channel = await running.channel(good)
    call = channel.unary_unary(
        "/veneer.test.v1.EchoService/UnaryUnary", StringValue.SerializeToString, StringValue.FromString
    )
    assert (await call(StringValue(value="x"))).value == "globex x"
    await running.idle()
    assert lines[-1]["subject"] == "worker-1"
    assert lines[-1]["tenant"] == "globex"


async def test_a_method_asks_for_its_role(serve: Any, credentials: Any) -> None:
    service = "veneer.test.v1.EchoService"
    running = await serve(roles={service: {"worker"}, f"{service}/UnaryStream": {"worker", "user"}}, **ECHO)
    error = await failure(start(await running.call("unary_unary"), "unary_unary"), "unary_unary")
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert status.from_rpc_error(error).reason == "ROLE_MISSING"
    assert "worker" in (error.details() or "")
    assert await answers(start(await running.call("unary_stream"), "unary_stream"), "unary_stream")
    running.token = credentials.worker
    assert await answers(start(await running.call("unary_unary"), "unary_unary"), "unary_unary")


async def test_a_method_without_an_entry_asks_for_the_role_user(serve: Any, credentials: Any) -> None:
    running = await serve(**ECHO)
    running.token = credentials.worker
    error = await failure(start(await running.call("unary_unary"), "unary_unary"), "unary_unary")
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_an_unknown_method_is_told_only_to_those_who_may_call(serve: Any) -> None:
    running = await serve(**ECHO)
    error = await failure(start(await running.call("unary_unary", "Nothing"), "unary_unary"), "unary_unary")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    running.token = "vnr_other"
    error = await failure(start(await running.call("unary_unary", "Nothing"), "unary_unary"), "unary_unary")
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_comes_back_as_it_was_raised(serve: Any, kind: str) -> None:
    raised = invalid(
        Violation("spec.lora.rank", "OUT_OF_RANGE", "must be 1..512, was 0"),
        Violation("spec.数", "REQUIRED", "must be given"),
    )
    running = await serve(**{kind: raising(kind, raised)})
    started = start(await running.call(kind), kind)
    error = await failure(started, kind)
    back = status.from_rpc_error(error)
    assert type(back) is InvalidArgument
    assert back.violations == raised.violations
    assert (back.reason, back.message) == ("INVALID_FIELDS", raised.message)
    # Google's own reader agrees, and the request id came along.
    assert rpc_status.from_call(error).code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "x-request-id" in dict(await started.trailing_metadata())


async def test_retry_and_resource_details_come_back(serve: Any) -> None:
    full = ResourceExhausted("QUEUE_FULL", "64 jobs wait, the limit", metadata={"limit": "64"}, retry_after_s=1.5)
    missing = NotFound("JOB_MISSING", "there is no such job", resource="trainingJobs/j-1")
    running = await serve(unary_unary=raising("unary_unary", full), unary_stream=raising("unary_stream", missing))
    back = status.from_rpc_error(await failure(start(await running.call("unary_unary"), "unary_unary"), "unary_unary"))
    assert (back.retry_after_s, back.metadata) == (1.5, {"limit": "64"})
    back = status.from_rpc_error(
        await failure(start(await running.call("unary_stream"), "unary_stream"), "unary_stream")
    )
    assert back.resource == "trainingJobs/j-1"


async def test_more_violations_than_metadata_can_hold_are_counted(serve: Any) -> None:
    raised = invalid(*(Violation(f"rows[{index}].text", "EMPTY", "必须填写" * 20) for index in range(10_000)))
    running = await serve(unary_unary=raising("unary_unary", raised))
    back = status.from_rpc_error(await failure(start(await running.call("unary_unary"), "unary_unary"), "unary_unary"))
    assert type(back) is InvalidArgument
    told = len(back.violations) - 1
    assert told > 1
    assert back.violations[-1].description == f"{10_000 - told} more, left out here"


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unknown_exception_says_nothing(serve: Any, kind: str, lines: Any) -> None:
    running = await serve(**{kind: raising(kind, RuntimeError("/srv/secret/path"))})
    error = await failure(start(await running.call(kind), kind), kind)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == status.INTERNAL_TEXT
    assert "secret" not in repr(error) + str(list(error.trailing_metadata()))
    await running.idle()
    failed, line = [line for line in lines if line["event"] != "listening"]
    assert "secret" in str(failed["exc_info"])
    assert (line["code"], line["request_id"]) == ("INTERNAL", failed["request_id"])


async def test_a_future_cancelled_by_the_servicer_itself_is_an_error(serve: Any) -> None:
    async def own(request: StringValue, context: Any) -> StringValue:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future
        return request

    running = await serve(unary_unary=own)
    error = await failure(start(await running.call("unary_unary"), "unary_unary", timeout=5), "unary_unary")
    assert error.code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("kind", KINDS)
async def test_a_servicers_own_abort_passes(serve: Any, kind: str, lines: Any, caplog: Any) -> None:
    async def one(request: Any, context: Any) -> StringValue:
        await to_the_end(request)
        await context.abort(grpc.StatusCode.ABORTED, "mine")

    async def stream(request: Any, context: Any) -> AsyncIterator[StringValue]:
        await to_the_end(request)
        yield StringValue()
        await context.abort(grpc.StatusCode.ABORTED, "mine")

    running = await serve(**{kind: one if kind.endswith("unary") else stream})
    error = await failure(start(await running.call(kind), kind), kind)
    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "mine")
    await running.idle()
    assert lines[-1]["code"] == "ABORTED"
    assert not said(caplog)


async def test_a_malformed_message_is_the_callers_fault(serve: Any) -> None:
    running = await serve(**ECHO)
    channel = await running.channel()
    for kind, method in (("unary_unary", "UnaryUnary"), ("stream_unary", "StreamUnary")):
        call = getattr(channel, kind)(f"/veneer.test.v1.EchoService/{method}")  # bytes as they are

        async def bad() -> AsyncIterator[bytes]:
            yield b"\xff\xff"

        error = await failure(call(b"\xff\xff") if kind.startswith("unary") else call(bad()), kind)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert status.from_rpc_error(error).reason == "MESSAGE_MALFORMED"


async def test_a_call_without_its_message_is_refused(serve: Any) -> None:
    running = await serve(**ECHO)
    channel = await running.channel()

    async def nothing() -> AsyncIterator[StringValue]:
        return
        yield

    call = channel.stream_unary("/veneer.test.v1.EchoService/UnaryUnary", StringValue.SerializeToString)
    error = await failure(call(nothing()), "stream_unary")
    assert status.from_rpc_error(error).reason == "MESSAGE_MISSING"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_message_over_the_limit_is_refused_and_the_next_call_passes(serve: Any, kind: str, caplog: Any) -> None:
    running = await serve(**ECHO)
    big = StringValue(value="x" * (4 * 1024 * 1024))
    method = "".join(word.title() for word in kind.split("_"))
    metadata = (("authorization", f"Bearer {running.token}"),)

    def send() -> grpc.RpcError:
        """A sync client: an aio one that is still writing may report INTERNAL."""
        with grpc.insecure_channel(running.address) as channel:
            call = getattr(channel, kind)(f"/veneer.test.v1.EchoService/{method}", StringValue.SerializeToString)
            try:
                answer = call(big if kind.startswith("unary") else iter([big]), metadata=metadata)
                list(answer if kind.endswith("stream") else [])
            except grpc.RpcError as error:
                return error
        pytest.fail("the message was accepted")

    error = await asyncio.to_thread(send)
    call = await running.call(kind)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()  # told by gRPC itself: no servicer saw the message
    assert await answers(start(call, kind), kind)
    assert not said(caplog)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_response_over_the_limit_fails_and_the_next_call_passes(serve: Any, kind: str, caplog: Any) -> None:
    async def one(request: Any, context: Any) -> StringValue:
        await to_the_end(request)
        return StringValue(value="x" * (5 * 1024 * 1024))

    async def stream(request: Any, context: Any) -> AsyncIterator[StringValue]:
        yield await one(request, context)

    running = await serve(**{kind: one if kind.endswith("unary") else stream})
    call = await running.call(kind)
    for _ in range(2):
        error = await failure(start(call, kind, timeout=5), kind)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert status.from_rpc_error(error).reason == "RESPONSE_TOO_LARGE"
    assert not said(caplog)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("timeout_s", [None, 60])
async def test_a_call_ends_at_the_servers_cap(serve: Any, kind: str, timeout_s: float | None) -> None:
    seen = []

    async def one(request: Any, context: Any) -> StringValue:
        seen.append(serving_call().time_remaining_s())
        await asyncio.sleep(3600)
        return StringValue()

    async def stream(request: Any, context: Any) -> AsyncIterator[StringValue]:
        yield await one(request, context)

    caps = {"unary_deadline_s": 0.2, "stream_deadline_s": 0.3}
    running = await serve(settings=caps, **{kind: one if kind.endswith("unary") else stream})
    error = await failure(start(await running.call(kind), kind, timeout=timeout_s), kind)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert status.from_rpc_error(error).reason == "DEADLINE_CAPPED"
    cap_s = 0.2 if kind == "unary_unary" else 0.3
    assert cap_s - 0.1 < seen[0] <= cap_s


async def test_the_callers_sooner_deadline_holds(serve: Any, lines: Any, caplog: Any) -> None:
    cancelled = asyncio.Event()

    async def slow(request: StringValue, context: Any) -> StringValue:
        assert 0 < serving_call().time_remaining_s() <= 0.25  # gRPC rounds a timeout up on the wire
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()
        return request

    running = await serve(unary_unary=slow)
    error = await failure(start(await running.call("unary_unary"), "unary_unary", timeout=0.2), "unary_unary")
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(2):
        await cancelled.wait()
        await running.idle()
    await asyncio.sleep(0.05)
    assert lines[-1]["code"] == "DEADLINE_EXCEEDED"
    assert not said(caplog)


async def test_a_timeout_of_the_servicers_own_is_no_deadline(serve: Any) -> None:
    async def own(request: StringValue, context: Any) -> StringValue:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(3600)
        return request

    running = await serve(unary_unary=own)
    error = await failure(start(await running.call("unary_unary"), "unary_unary"), "unary_unary")
    assert error.code() is grpc.StatusCode.INTERNAL


async def test_an_expired_call_does_no_work(serve: Any) -> None:
    """The loop is held while the second call waits at the door; when it comes in, its time is over."""
    worked = []

    async def work(request: StringValue, context: Any) -> StringValue:
        worked.append(request.value)
        if request.value == "hold":
            time.sleep(1.0)  # noqa: ASYNC251  # holding the loop is the point
        return request

    running = await serve(unary_unary=work)
    address, token = running.address, running.token

    def late() -> grpc.StatusCode:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(5)
            call = channel.unary_unary(
                "/veneer.test.v1.EchoService/UnaryUnary",
                StringValue.SerializeToString,
                StringValue.FromString,
            )
            metadata = (("authorization", f"Bearer {token}"),)
            holder = call.future(StringValue(value="hold"), metadata=metadata)
            time.sleep(0.3)
            with pytest.raises(grpc.RpcError) as caught:
                call(StringValue(value="late"), metadata=metadata, timeout=0.2)
            holder.result()
            return caught.value.code()

    assert await asyncio.to_thread(late) is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.1)
    assert worked == ["hold"]


@pytest.mark.parametrize("kind", ["unary_stream", "stream_stream"])
@pytest.mark.parametrize("ending", ["passes on", "raises", "returns"])
async def test_a_cancel_in_mid_stream_reaches_the_servicer_and_leaves_no_noise(
    serve: Any, kind: str, ending: str, lines: Any, caplog: Any
) -> None:
    ended = asyncio.Event()

    async def stream(request: Any, context: Any) -> AsyncIterator[StringValue]:
        try:
            yield StringValue(value="first")
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if ending == "passes on":
                raise
            if ending == "raises":
                raise ValueError("in clean-up") from None
        finally:
            ended.set()

    caplog.set_level(logging.WARNING)
    running = await serve(**{kind: stream})
    started = start(await running.call(kind), kind)
    assert (await started.read()).value == "first"
    started.cancel()
    await started.code()
    async with asyncio.timeout(2):
        await ended.wait()
    await running.idle()
    await asyncio.sleep(0.1)
    assert not said(caplog)
    assert lines[-1]["code"] == "CANCELLED"
    assert [line["event"] for line in lines if line["log_level"] == "error"] == (
        ["call failed"] if ending == "raises" else []
    )


async def _until_the_end(started: Any) -> None:
    """Leaves nothing of a call to the next test: its status comes only after the responses."""
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        while hasattr(started, "read") and await started.read() is not grpc.aio.EOF:
            pass
    await started.code()


@pytest.mark.parametrize("kind", ["stream_unary", "stream_stream"])
@pytest.mark.parametrize("ending", ["cancel", "over the limit"])
async def test_requests_cut_short_never_look_complete(serve: Any, kind: str, ending: str, caplog: Any) -> None:
    """Without help, grpc.aio ends the iteration as if the client had said all."""
    seen, complete = asyncio.Event(), []

    async def upload(requests: AsyncIterator[StringValue], context: Any) -> StringValue:
        async for _ in requests:
            seen.set()
        complete.append(True)
        return StringValue()

    async def chat(requests: AsyncIterator[StringValue], context: Any) -> AsyncIterator[StringValue]:
        async for request in requests:
            seen.set()
            yield request
        complete.append(True)

    running = await serve(**{kind: upload if kind == "stream_unary" else chat})
    channel = await running.stack.enter_async_context(grpc.aio.insecure_channel(running.address))
    method = "".join(word.title() for word in kind.split("_"))
    call = getattr(channel, kind)(f"/veneer.test.v1.EchoService/{method}", StringValue.SerializeToString)
    for _ in range(20):
        seen.clear()
        started = call(metadata=(("authorization", f"Bearer {running.token}"),))
        await started.write(StringValue(value="part"))
        async with asyncio.timeout(5):
            await seen.wait()
            if ending == "cancel":
                started.cancel()
            else:
                await started.write(StringValue(value="x" * (4 * 1024 * 1024)))
            await _until_the_end(started)
        await running.idle()
    assert not complete
    assert not said(caplog)


async def test_a_cancel_while_writing_closes_the_generator(serve: Any, caplog: Any) -> None:
    """A client that does not read blocks the write; the generator is suspended at its `yield` then."""
    ended = asyncio.Event()

    async def flood(request: Any, context: Any) -> AsyncIterator[StringValue]:
        try:
            while True:
                yield StringValue(value="x" * 1_000_000)
        finally:
            await asyncio.sleep(0)
            ended.set()

    running = await serve(unary_stream=flood)
    started = start(await running.call("unary_stream"), "unary_stream")
    await started.read()
    await asyncio.sleep(0.3)
    started.cancel()
    await started.code()
    await running.idle()
    assert ended.is_set()
    assert not said(caplog)


@pytest.mark.parametrize("kind", ["unary_unary", "stream_unary"])
async def test_a_cancelled_unary_answer_frees_its_slot(serve: Any, kind: str, caplog: Any) -> None:
    begun = asyncio.Event()

    async def slow(request: Any, context: Any) -> StringValue:
        begun.set()
        await asyncio.sleep(3600)
        return StringValue()

    running = await serve(settings={"max_concurrent_calls": 1}, **{kind: slow})
    call = await running.call(kind)
    for _ in range(3):  # each would be refused if the one before had kept the slot
        begun.clear()
        started = start(call, kind, None if kind.startswith("unary") else endless())
        async with asyncio.timeout(2):
            await begun.wait()
        started.cancel()
        await started.code()
        await running.idle()
    assert not said(caplog)


async def test_calls_over_the_bound_are_refused_with_a_hint_while_health_answers(serve: Any) -> None:
    release = asyncio.Event()

    async def hold(request: Any, context: Any) -> AsyncIterator[StringValue]:
        yield StringValue()
        await release.wait()

    running = await serve(settings={"max_concurrent_calls": 8}, unary_stream=hold)
    call = await running.call("unary_stream")
    started = [start(call, "unary_stream") for _ in range(1000)]  # on one connection

    async def first(one: Any) -> Any:
        try:
            return await one.read()
        except grpc.aio.AioRpcError as error:
            return error

    outcomes = await asyncio.gather(*map(first, started))
    refused = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert len(outcomes) - len(refused) == 8
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert status.from_rpc_error(refused[0]).retry_after_s == 1.0
    channel = await running.channel()
    assert await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    release.set()
    served = [one for one, each in zip(started, outcomes, strict=True) if each not in refused]
    for one in served:
        assert await one.read() is grpc.aio.EOF
    await running.idle()
    assert (await start(call, "unary_stream").read()) is not None


async def test_a_connection_never_has_more_streams_than_it_may(serve: Any) -> None:
    """What is over waits on the client's side; what its next turn finds full again is refused unseen."""
    begun, release = [], asyncio.Event()

    async def hold(request: Any, context: Any) -> StringValue:
        begun.append(1)
        await release.wait()
        return request

    running = await serve(settings={"max_concurrent_streams": 5}, unary_unary=hold)
    call = await running.call("unary_unary")
    channel = await running.channel()  # shares the connection; after this it knows the limit
    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    started = [start(call, "unary_unary") for _ in range(20)]
    await asyncio.sleep(0.5)
    assert len(begun) == 5
    release.set()
    outcomes = await asyncio.gather(*started, return_exceptions=True)
    failed = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert {error.code() for error in failed} <= {grpc.StatusCode.UNAVAILABLE}
    assert len(begun) == 20 - len(failed)


async def test_no_call_is_current_outside_one(serve: Any) -> None:
    later: dict[str, Any] = {}

    async def leave(request: StringValue, context: Any) -> StringValue:
        async def background() -> None:
            await asyncio.sleep(0.1)
            later["call"] = current_call()

        later["inside"] = current_call()
        later["task"] = asyncio.create_task(background())
        later["thread"] = await asyncio.to_thread(current_call)
        return request

    running = await serve(unary_unary=leave)
    await start(await running.call("unary_unary"), "unary_unary")
    await later["task"]
    assert later["inside"] is later["thread"] is not None
    assert later["call"] is None
    assert current_call() is None
    with pytest.raises(LookupError):
        serving_call()


async def test_every_error_of_the_domain_keeps_its_code(serve: Any) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.VeneerError)]
    assert len(kinds) == 16

    async def fail(request: StringValue, context: Any) -> StringValue:
        raise getattr(errors, request.value)("SOME_REASON", "some text")

    running = await serve(unary_unary=fail)
    call = await running.call("unary_unary")
    for kind in kinds:
        back = status.from_rpc_error(await failure(call(StringValue(value=kind.__name__)), "unary_unary"))
        assert type(back) is (errors.Internal if kind is errors.VeneerError else kind)
        assert back.message == (
            "some text" if kind not in (errors.Internal, errors.VeneerError) else status.INTERNAL_TEXT
        )
