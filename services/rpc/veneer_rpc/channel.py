"""A client's side of a connection: limits and keepalive match the servers'. Free of server code."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from veneer_rpc.addresses import is_local
from veneer_rpc.calls import REQUEST_ID_KEY, current_call

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
KEEPALIVE_S = 30.0
KEEPALIVE_TIMEOUT_S = 10.0


def open_channel(
    target: str,
    credential: str | Callable[[], str] | None = None,
    *,
    root_certificates_pem: bytes | None = None,
    keepalive_s: float = KEEPALIVE_S,
    keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
) -> grpc.aio.Channel:
    """Opens a channel; the caller closes it. Nothing is sent before the first call.

    Nothing is retried that a servicer may have seen; gRPC itself sends a call once more whose stream the
    server refused unseen (gRFC A6, transparent retries). A call made while another is being served passes
    its request id on, and at most the time that one has left.

    Args:
        target: host:port or unix:/path.
        credential: a token or delegation, or what returns the one to use now.
        root_certificates_pem: whom to trust; makes the connection TLS.
        keepalive_s: silence after which a ping is sent.
        keepalive_timeout_s: how long its answer may take before the connection counts as dead.

    Raises:
        ValueError: the credential would cross a network in clear text.
    """
    local = is_local(target)
    if credential is not None and root_certificates_pem is None and not local:
        raise ValueError(f"no credential is sent to {target} without TLS: give root_certificates_pem")
    options = connection_options(keepalive_s, keepalive_timeout_s)
    if local:
        options.append(("grpc.enable_http_proxy", 0))
    interceptors = [kind(credential) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)]
    if root_certificates_pem is None:
        return grpc.aio.insecure_channel(target, options, interceptors=interceptors)
    credentials = grpc.ssl_channel_credentials(root_certificates_pem)
    return grpc.aio.secure_channel(target, credentials, options, interceptors=interceptors)


def connection_options(keepalive_s: float, keepalive_timeout_s: float) -> list[tuple[str, int]]:
    """Returns the gRPC core arguments that both ends of a connection share."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", round(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(keepalive_timeout_s * 1000)),
        # Without it the core waits a minute for a ping's answer, whatever the keepalive timeout says.
        ("grpc.http2.ping_timeout_ms", round(keepalive_timeout_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),  # else pings stop on a silent stream
        # A service that is back is found within seconds, not within the core's two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


_Started = Any  # the call, of one of four kinds
_Continuation = Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[_Started]]


class _Outgoing:
    """Adds credential and request id, and cuts the timeout to what the call being served has left."""

    def __init__(self, credential: str | Callable[[], str] | None) -> None:
        self._credential = credential

    async def _call(
        self, continuation: _Continuation, details: grpc.aio.ClientCallDetails, request: object
    ) -> _Started:
        metadata = list(details.metadata or ())
        timeout_s = details.timeout
        if self._credential is not None:
            credential = self._credential if isinstance(self._credential, str) else self._credential()
            metadata.append(("authorization", f"Bearer {credential}"))
        serving = current_call()
        if serving is not None:
            metadata.append((REQUEST_ID_KEY, serving.request_id))
            left_s = serving.time_remaining_s()
            timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
        complete = grpc.aio.ClientCallDetails(
            details.method,
            timeout_s,
            grpc.aio.Metadata(*metadata),
            details.credentials,
            details.wait_for_ready,
        )
        return await continuation(complete, request)


# One class a kind: grpc.aio uses an object that is of several kinds for the first of them only.
class _UnaryUnary(_Outgoing, grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary = _Outgoing._call  # type: ignore[assignment]  # generic in messages


class _UnaryStream(_Outgoing, grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream = _Outgoing._call  # type: ignore[assignment]  # generic in messages


class _StreamUnary(_Outgoing, grpc.aio.StreamUnaryClientInterceptor):
    intercept_stream_unary = _Outgoing._call  # type: ignore[assignment]  # generic in messages


class _StreamStream(_Outgoing, grpc.aio.StreamStreamClientInterceptor):
    intercept_stream_stream = _Outgoing._call  # type: ignore[assignment]  # generic in messages
