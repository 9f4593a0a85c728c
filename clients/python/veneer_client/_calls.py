"""Calls to one service: the channel, the token, deadlines, and when a failed call is made again.

A call is made again for UNAVAILABLE, and for RESOURCE_EXHAUSTED once the time of its RetryInfo has passed;
and only where a second one does no harm: it reads, or it carries a `request_id`.
"""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

import grpc

from veneer_client._address import is_local
from veneer_client._errors import (
    ClusterNotFound,
    DeadlineExceeded,
    ResourceExhausted,
    StatusError,
    Unavailable,
    from_rpc_error,
)

CALL_TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 3600.0
ATTEMPTS = 5
FOLLOW_ATTEMPTS = 25  # with the waits below, a service may be away for about a minute
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0

# As the servers have them: a larger message or a faster ping would be refused there.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),  # the rule above is ours alone
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

_Q = TypeVar("_Q")
_R = TypeVar("_R")
_S = TypeVar("_S")
_Item = TypeVar("_Item")


class Patience:
    """Counts the failures of one piece of work in a row, and waits before the next attempt."""

    def __init__(self, timeout_s: float, attempts: int = ATTEMPTS) -> None:
        self._end_s = time.monotonic() + timeout_s
        self._attempts = attempts
        self._failures = 0

    def left_s(self) -> float:
        """Seconds until the work's deadline."""
        return max(self._end_s - time.monotonic(), 0.0)

    def progressed(self) -> None:
        """The work came on: failures before this do not count."""
        self._failures = 0

    async def wait(self, error: StatusError) -> None:
        """Waits until trying again makes sense.

        Raises:
            StatusError: the error itself, where it does not or there is no time or attempt left.
        """
        self._failures += 1
        wait_s = _wait_s(error, self._failures)
        if wait_s is None or self._failures >= self._attempts or wait_s >= self.left_s():
            raise error
        await asyncio.sleep(wait_s)


def _wait_s(error: StatusError, failures: int) -> float | None:
    spread = random.random()  # noqa: S311  # so that clients do not come back all at once
    if isinstance(error, Unavailable):
        longest_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0**failures)
        return max(error.retry_after_s or 0.0, longest_s * (0.5 + spread / 2))
    if isinstance(error, ResourceExhausted) and error.retry_after_s is not None:
        return error.retry_after_s * (1 + spread / 10)
    return None


class Connection:
    """One service at one address. Nothing is opened before the first call.

    Args:
        address: host:port or unix:/path.
        token: who calls.
        certificates_pem: to trust instead of the system's.
        name: that the service's certificate is for, where it is not the address's own.
    """

    def __init__(self, address: str, token: str, certificates_pem: bytes | None = None, name: str = "") -> None:
        self.address = address
        self._name = name
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._certificates_pem = certificates_pem
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[object, Any] = {}

    def stub(self, kind: Callable[[grpc.aio.Channel], _S]) -> _S:
        """Returns the service's stub. Call it on the event loop that will use it."""
        if kind not in self._stubs:
            self._stubs[kind] = kind(self._open())
        stub: _S = self._stubs[kind]
        return stub

    async def read(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Q, _R],
        request: _Q,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> _R:
        """Calls what changes nothing, again if need be."""
        patience = Patience(timeout_s)
        while True:
            try:
                return await self.once(method, request, patience.left_s())
            except StatusError as error:
                await patience.wait(error)

    async def change(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Q, _R],
        request: _Q,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> _R:
        """Calls what changes something; again if need be, where the request has a `request_id` to fill in."""
        if not fill_request_id(request):
            return await self.once(method, request, timeout_s)
        return await self.read(method, request, timeout_s)

    async def once(self, method: grpc.aio.UnaryUnaryMultiCallable[_Q, _R], request: _Q, timeout_s: float) -> _R:
        """Makes one attempt."""
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.address) from None

    async def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[_Q, _R],
        request: _Q,
        timeout_s: float = STREAM_TIMEOUT_S,
    ) -> AsyncIterator[_R]:
        """Yields the messages of one attempt; leaving early cancels it."""
        call = method(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.address) from None
        finally:
            call.cancel()

    async def send(
        self,
        method: grpc.aio.StreamUnaryMultiCallable[_Q, _R],
        requests: AsyncIterator[_Q],
        timeout_s: float = STREAM_TIMEOUT_S,
    ) -> _R:
        """Sends a stream of requests in one attempt; what the iterator raises comes out here."""
        failure: Exception | None = None

        async def watched() -> AsyncIterator[_Q]:
            nonlocal failure
            try:
                async for request in requests:
                    yield request
            except Exception as error:
                failure = error
                raise

        try:
            return await method(watched(), timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            refused = from_rpc_error(error, self.address)
            if refused.reason == grpc.StatusCode.INTERNAL.name:
                # grpc.aio wrote on after the service had ended the call, and put an error of its own in the
                # place of the service's. Whatever that was, the next attempt will hear it.
                refused = Unavailable("STREAM_BROKEN", f"{self.address} ended the stream: {refused.message}")
            raise refused from None
        except asyncio.CancelledError:  # all that grpc says when the iterator raised
            if failure is not None:
                raise failure from None
            raise

    async def pages(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Any, _R],
        request: Any,  # noqa: ANN401  # any request of a list
        items: Callable[[_R], Iterable[_Item]],
    ) -> AsyncIterator[_Item]:
        """Yields the items of all pages, a page at a time."""
        while True:
            response = await self.read(method, request)
            for item in items(response):
                yield item
            request.page_token = response.next_page_token  # type: ignore[attr-defined]  # every list has it
            if not request.page_token:
                return

    async def follow(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Any, _R],
        request: Any,  # noqa: ANN401  # any request with `after_revision`
        item: Callable[[_R], _Item],
    ) -> AsyncIterator[_Item]:
        """Yields the snapshots of something watched; a broken stream goes on after the last revision seen."""
        patience = Patience(float("inf"), FOLLOW_ATTEMPTS)
        while True:
            try:
                async for message in self.stream(method, request):
                    snapshot = item(message)
                    request.after_revision = snapshot.revision  # type: ignore[attr-defined]
                    patience.progressed()
                    yield snapshot
                return
            except DeadlineExceeded:
                continue  # the stream's own time was over
            except StatusError as error:
                await patience.wait(error)

    async def close(self) -> None:
        """Ends the connection and the calls on it."""
        if self._channel is not None:
            await self._channel.close()

    def _open(self) -> grpc.aio.Channel:
        if not self.address:
            raise ClusterNotFound("neither dataset nor trainer is known: what answers alone has neither")
        if self._channel is None:
            local = is_local(self.address)
            options: list[tuple[str, int | str]] = [*_OPTIONS, *([("grpc.enable_http_proxy", 0)] if local else [])]
            if local and self._certificates_pem is None:
                self._channel = grpc.aio.insecure_channel(self.address, options)
            else:  # a token never crosses a network in clear text
                options += [("grpc.ssl_target_name_override", self._name)] if self._name else []
                credentials = grpc.ssl_channel_credentials(self._certificates_pem)
                self._channel = grpc.aio.secure_channel(self.address, credentials, options)
        return self._channel


def fill_request_id(request: Any) -> bool:  # noqa: ANN401  # any request message
    """Gives a request that has a `request_id` one of its own; returns whether it has the field."""
    if "request_id" not in request.DESCRIPTOR.fields_by_name:
        return False
    if not request.request_id:
        request.request_id = str(uuid.uuid4())
    return True
