"""What a real connection cannot show at will; the rest is in tests/integration."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from veneer_rpc import status
from veneer_rpc.authentication import RoleTable
from veneer_rpc.calls import Principal
from veneer_rpc.channel import MAX_MESSAGE_BYTES
from veneer_rpc.errors import ResourceExhausted
from veneer_rpc.interceptors import CallInterceptor, CallLimits


class AnyCaller:
    def authenticate(self, authorization: str | None) -> Principal:
        return Principal("acme", frozenset({"user"}))


class LateContext:
    """A call whose deadline is over, but which gRPC has not cancelled yet."""

    def __init__(self) -> None:
        self.aborted: Any = None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> float:
        return 0.0

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def code(self) -> Any:  # noqa: ANN401  # a StatusCode, once there is one
        return self.aborted

    async def read(self) -> bytes:
        return b"request"

    async def write(self, message: object) -> None:
        return

    def set_trailing_metadata(self, metadata: object) -> None:
        return

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: object) -> None:
        self.aborted, self.details = code, dict(trailing_metadata)[status.DETAILS_KEY]  # type: ignore[call-overload]
        raise grpc.aio.AbortError


async def test_a_response_that_a_servicer_serialised_itself_passes_as_it_is_within_the_bound() -> None:
    async def find(details: object) -> grpc.RpcMethodHandler:
        return grpc.unary_stream_rpc_method_handler(None, response_serializer=lambda text: text.encode())

    class Details:
        method = "/veneer.test.v1.EchoService/UnaryStream"

    interceptor = CallInterceptor(AnyCaller(), RoleTable({}), CallLimits(1, 1.0, 1.0))
    serialize = (await interceptor.intercept_service(find, Details())).response_serializer
    assert serialize("a") == b"a"
    assert serialize(b"as it is") == b"as it is"
    with pytest.raises(ResourceExhausted, match="bytes, the limit is"):
        serialize(bytes(MAX_MESSAGE_BYTES + 1))


async def test_an_expired_deadline_does_no_work_even_before_grpc_cancels_the_call() -> None:
    worked = []

    async def work(request: bytes, context: object) -> bytes:
        worked.append(request)
        return request

    async def find(details: object) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(work)

    class Details:
        method = "/veneer.test.v1.EchoService/UnaryUnary"
        invocation_metadata = ()

    async def nothing() -> AsyncIterator[bytes]:
        return
        yield

    interceptor = CallInterceptor(AnyCaller(), RoleTable({}), CallLimits(1, 1.0, 1.0))
    handler = await interceptor.intercept_service(find, Details())
    context = LateContext()
    with pytest.raises(grpc.aio.AbortError):
        await asyncio.create_task(handler.stream_stream(nothing(), context))
    assert context.aborted is grpc.StatusCode.DEADLINE_EXCEEDED
    assert b"DEADLINE_EXPIRED" in context.details
    assert not worked
