"""What happens around every call, so that a servicer only converts, calls and converts back.

In this order:

1. request id and clock; whatever follows ends in one log line and one status
2. authentication and role, from metadata alone: the body of a refused call is never read
3. a slot, of a bounded number
4. deadline: the caller's or the server's cap, whichever is sooner; an expired one does no work
5. the servicer
6. errors to statuses; the request id goes back in the trailing metadata

All four kinds of call are served as a stream of requests and a stream of responses, which on the wire they
are (the kinds differ only in generated code). So there is one path, it is entered before a message has
arrived, and it runs in one task: a cancel always reaches the servicer's innermost `await`, and a generator
is closed before the call ends.
"""

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from veneer_rpc import calls, health, status
from veneer_rpc.authentication import Authenticator, RoleTable
from veneer_rpc.calls import REQUEST_ID_KEY, Call
from veneer_rpc.channel import MAX_MESSAGE_BYTES
from veneer_rpc.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unimplemented

_log = structlog.get_logger(__name__)
_CANCEL_FOLLOWS_S = 1.0  # at most: gRPC cancels a task within milliseconds of its call's end
_SETTLE_S = 0.02
_Context = grpc.aio.ServicerContext[Any, Any]
_Handler = Any  # grpc.RpcMethodHandler: four callables of which one is set, untyped in grpc's stubs


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Bounds of a server's calls.

    `max_calls` counts health probes apart from the rest, so that a full server still tells its health and a
    crowd of probes takes no work's place.
    """

    max_calls: int
    unary_deadline_s: float
    stream_deadline_s: float


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Serves every call of a server; see the module for the order."""

    def __init__(self, authenticator: Authenticator, roles: RoleTable, limits: CallLimits) -> None:
        self._authenticator = authenticator
        self._roles = roles
        self._limits = limits
        self._slots: Counter[bool] = Counter()  # in use, by whether for a health probe
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self, timeout_s: float) -> None:
        """Waits until every call has ended, cancelled ones and their clean-up too.

        Raises:
            TimeoutError: a servicer did not return.
        """
        async with asyncio.timeout(timeout_s):
            await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Puts this server's path around the handler of one call."""
        method = handler_call_details.method.lstrip("/")
        handler = await continuation(handler_call_details) or _unimplemented(method)

        async def serve(requests: AsyncIterator[Any], context: _Context) -> None:
            await self._serve(method, handler, requests, context)

        return grpc.stream_stream_rpc_method_handler(
            serve, _reading(handler.request_deserializer), _bounding(handler.response_serializer)
        )

    async def _serve(
        self,
        method: str,
        handler: _Handler,
        requests: AsyncIterator[Any],
        context: _Context,
    ) -> None:
        metadata = dict(context.invocation_metadata() or ())
        call = Call(method, calls.request_id_from(_text(metadata.get(REQUEST_ID_KEY))))
        calls.enter(call)
        self._open += 1
        self._idle.clear()
        structlog.contextvars.bind_contextvars(request_id=call.request_id)
        code, peer = grpc.StatusCode.OK, context.peer()  # a cancelled call has no peer
        try:
            await self._respond(call, handler, requests, context, _text(metadata.get("authorization")))
            code = context.code() or code
        except grpc.aio.AbortError:
            code = context.code()
            raise
        except (asyncio.CancelledError, grpc.aio.InternalError) as error:
            expired = context.time_remaining() == 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from error  # the one gRPC takes without noise
        finally:
            call.finished = True
            _log_call(call, code, peer)
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _respond(
        self,
        call: Call,
        handler: _Handler,
        requests: AsyncIterator[Any],
        context: _Context,
        authorization: str | None,
    ) -> None:
        try:
            self._admit(call, authorization)
            with self._slot(call.method):
                await self._run(call, handler, requests, context)
            if _task_cancelled():
                raise asyncio.CancelledError  # which the servicer caught; there is nobody to answer
            context.set_trailing_metadata((*context.trailing_metadata(), (REQUEST_ID_KEY, call.request_id)))
        except grpc.aio.AbortError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            await _abort(context, call, error)

    def _admit(self, call: Call, authorization: str | None) -> None:
        if _is_health(call.method):
            return
        call.principal = self._authenticator.authenticate(authorization)
        structlog.contextvars.bind_contextvars(tenant=call.tenant)
        self._roles.check(call.method, call.principal)

    @contextmanager
    def _slot(self, method: str) -> Iterator[None]:
        kind = _is_health(method)
        if self._slots[kind] >= self._limits.max_calls:
            raise ResourceExhausted(
                "TOO_MANY_CALLS",
                f"{self._limits.max_calls} calls are being served, which is this server's limit",
                metadata={"limit": str(self._limits.max_calls)},
                retry_after_s=1.0,
            )
        self._slots[kind] += 1
        try:
            yield
        finally:
            self._slots[kind] -= 1

    async def _run(
        self,
        call: Call,
        handler: _Handler,
        requests: AsyncIterator[Any],
        context: _Context,
    ) -> None:
        streaming = handler.request_streaming or handler.response_streaming
        cap_s = self._limits.stream_deadline_s if streaming else self._limits.unary_deadline_s
        remaining_s = context.time_remaining()
        capped = remaining_s is None or remaining_s > cap_s
        limit_s = cap_s if remaining_s is None else min(cap_s, remaining_s)
        call.deadline_s = time.monotonic() + limit_s
        if limit_s <= 0:
            raise DeadlineExceeded("DEADLINE_EXPIRED", "the deadline was over before the work began")
        try:
            async with asyncio.timeout(limit_s if capped else None) as timer:  # else gRPC cancels at the deadline
                await _converse(handler, requests, context)
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise DeadlineExceeded("DEADLINE_CAPPED", f"the call took this server's limit of {cap_s:g} s") from error


def method_of(handler: _Handler) -> Callable[..., Any]:
    """Returns the servicer's own method, whichever of the four kinds it is."""
    method: Callable[..., Any] = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    return method


async def _converse(handler: _Handler, requests: AsyncIterator[Any], context: _Context) -> None:
    """Lets the servicer's method answer."""
    behaviour = method_of(handler)
    if handler.request_streaming:
        result = behaviour(_to_the_true_end(requests, context), context)
    else:
        request = await context.read()
        if request is grpc.aio.EOF:
            await asyncio.sleep(_CANCEL_FOLLOWS_S)  # a cancel, or a message over the limit, most likely
            raise InvalidArgument("MESSAGE_MISSING", "the call ended without its request message")
        result = behaviour(request, context)
    if inspect.isasyncgen(result):
        async with aclosing(result) as responses:
            async for response in responses:
                await _write(context, response)
    elif handler.response_streaming:
        await result  # it writes to the context itself
    else:
        await _write(context, await result)


async def _to_the_true_end(requests: AsyncIterator[Any], context: _Context) -> AsyncIterator[Any]:
    """Yields the requests, and ends only if the client ended them.

    grpc.aio ends the stream as if all had been said when the client cancels or dies or sends a message over
    the limit, and cancels the task a moment later: an upload cut short would look complete. An operation
    that needs a living call tells them apart. Sending the initial metadata is one, but only once; after a
    response a pause must do.
    """
    async for request in requests:
        yield request
    try:
        await context.send_initial_metadata(())
    except grpc.aio.UsageError:  # sent with the first response
        await asyncio.sleep(_SETTLE_S)
    except grpc.aio.InternalError:
        await asyncio.sleep(_CANCEL_FOLLOWS_S)
        raise


async def _write(context: _Context, response: object) -> None:
    try:
        await context.write(response)
    except grpc.aio.InternalError:
        # The connection is gone, and gRPC is about to cancel this task. Take that here, or it would
        # interrupt the clean-up of the servicer's generator.
        await asyncio.sleep(_CANCEL_FOLLOWS_S)
        raise


async def _abort(context: _Context, call: Call, error: BaseException) -> None:
    """Ends a call with the status of an exception, unless nobody is there to hear it.

    A CancelledError need not mean that the call was cancelled: the servicer may have awaited a future of
    its own that was. gRPC would send no status then, and the client would wait for ever.
    """
    if isinstance(error, grpc.aio.InternalError):  # a read or write failed: the connection is gone
        raise error
    gone = _task_cancelled()
    expected = gone and isinstance(error, asyncio.CancelledError)
    if status.code_of(error) is grpc.StatusCode.INTERNAL and not expected:
        _log.error("call failed", method=call.method, exc_info=error)
    if gone:
        raise asyncio.CancelledError from error
    wire = status.from_exception(error)
    details = ((status.DETAILS_KEY, wire.SerializeToString()), (REQUEST_ID_KEY, call.request_id))
    await context.abort(status.code_of(error), wire.message, (*context.trailing_metadata(), *details))


def _task_cancelled() -> bool:
    """Says whether gRPC has cancelled this call: no status can be sent then, and trying logs a trace."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _log_call(call: Call, code: grpc.StatusCode, peer: str) -> None:
    log = _log.debug if _is_health(call.method) else _log.info
    log(
        "call",
        method=call.method,
        code=code.name,
        duration_ms=round((time.monotonic() - call.started_s) * 1000, 3),
        tenant=call.tenant,
        request_id=call.request_id,
        peer=peer,
        **({"subject": call.principal.subject} if call.principal and call.principal.subject else {}),
    )


def _unimplemented(method: str) -> _Handler:
    async def refuse(requests: AsyncIterator[bytes], context: _Context) -> None:
        raise Unimplemented("METHOD_UNKNOWN", f"this server has no method {method[:200]}")

    return grpc.stream_stream_rpc_method_handler(refuse)


def _reading(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if parse is None:
        return None

    def read(raw: bytes) -> Any:  # noqa: ANN401  # a message of whatever type the method takes
        try:
            return parse(raw)
        except DecodeError as error:
            raise InvalidArgument("MESSAGE_MALFORMED", "the message is not of the method's type") from error

    return read


def _bounding(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Serialises and bounds responses; bytes are one that a servicer serialised itself, off the event loop."""

    def serialize_bounded(response: Any) -> bytes:  # noqa: ANN401
        raw = response if serialize is None or isinstance(response, bytes) else serialize(response)
        if len(raw) > MAX_MESSAGE_BYTES:  # gRPC would cut the call off without a word to the log
            raise ResourceExhausted(
                "RESPONSE_TOO_LARGE", f"the response has {len(raw)} bytes, the limit is {MAX_MESSAGE_BYTES}"
            )
        return raw

    return serialize_bounded


def _is_health(method: str) -> bool:
    return method.startswith(f"{health.SERVICE}/")


def _text(value: str | bytes | None) -> str | None:
    return value if isinstance(value, str) else None
