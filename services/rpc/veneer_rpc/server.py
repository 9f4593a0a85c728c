"""A grpc.aio server from settings and servicers: bound, watched over, and stopped with grace."""

import asyncio
import inspect
import signal
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]  # generated
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]  # has no stubs

from veneer_rpc.authentication import Authenticator, RoleTable
from veneer_rpc.channel import connection_options
from veneer_rpc.health import Health
from veneer_rpc.interceptors import CallInterceptor, CallLimits, method_of
from veneer_rpc.settings import ServerSettings

_log = structlog.get_logger(__name__)
_CLEANUP_S = 5.0  # what a cancelled servicer's `finally` may take, after the grace


class BindError(OSError):
    """The address cannot be listened on; the message names it."""


class Server:
    """One process's gRPC server.

    Args:
        settings: validated settings.
        services: what registers each servicer, such as `partial(add_DatasetServiceServicer_to_server,
            servicer)`.
        authenticator: knows the callers; only health is open to all.
        roles: by service or method, see RoleTable.

    Raises:
        ValueError: a role is asked for a method that no service has, or a servicer's method is not async.
    """

    def __init__(
        self,
        settings: ServerSettings,
        services: Sequence[Callable[[Any], None]],
        authenticator: Authenticator,
        roles: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        self._settings = settings
        table = RoleTable(roles or {})
        limits = CallLimits(settings.max_concurrent_calls, settings.unary_deadline_s, settings.stream_deadline_s)
        self._calls = CallInterceptor(authenticator, table, limits)
        self._server = grpc.aio.server(interceptors=[self._calls], options=_options(settings))
        registered = _Registrar(self._server)
        for register in services:
            register(registered)
        unknown = table.names - registered.names
        if unknown:
            raise ValueError(f"roles for what is not served: {', '.join(sorted(unknown))}")
        self.health = Health(registered.services)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if settings.reflection:
            reflection.enable_server_reflection((*registered.services, reflection.SERVICE_NAME), self._server)

    async def start(self) -> str:
        """Starts to listen and returns the address, with the real port where port 0 was asked for.

        Raises:
            BindError: the address is in use, not ours or not permitted.
        """
        address = self._settings.bind
        _refuse_live_socket(address)
        try:
            port = self._add_port(address)
        except RuntimeError as error:
            raise BindError(f"cannot listen on {address}: {error}") from error
        if not address.startswith("unix"):
            address = f"{address.rpartition(':')[0]}:{port}"
        await self._server.start()
        _log.info("listening", address=address, tls=self._settings.tls)
        return address

    async def run(self) -> None:
        """Waits for SIGTERM or SIGINT, then stops. A second signal cuts the grace short."""
        loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        stop, hurry = asyncio.Event(), asyncio.Event()
        for number in signals:
            loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
        try:
            await stop.wait()
            stopping = asyncio.create_task(self.stop())
            hurrying = asyncio.create_task(hurry.wait())
            await asyncio.wait({stopping, hurrying}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                await self._server.stop(0)
            hurrying.cancel()
            await stopping
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def stop(self) -> None:
        """Says NOT_SERVING, takes no more calls, lets those in flight use the grace, cancels the rest."""
        self.health.stop()
        await asyncio.sleep(0)  # watchers hear of it before the connection begins to close
        _log.info("stopping", grace_s=self._settings.grace_s)
        await self._server.stop(self._settings.grace_s)
        await self._calls.wait_idle(_CLEANUP_S)

    def _add_port(self, address: str) -> int:
        settings = self._settings
        if settings.tls_key_file is None or settings.tls_certificate_file is None:
            return self._server.add_insecure_port(address)
        pair = (settings.tls_key_file.read_bytes(), settings.tls_certificate_file.read_bytes())
        return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))


def _options(settings: ServerSettings) -> list[tuple[str, int]]:
    return [
        *connection_options(settings.keepalive_s, settings.keepalive_timeout_s),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that pings more often than this, three times over, is told ENHANCE_YOUR_CALM and cut off.
        # Half the interval leaves room for the jitter of a client with the same settings.
        ("grpc.http2.min_ping_interval_without_data_ms", round(settings.keepalive_s * 500)),
        ("grpc.http2.max_ping_strikes", 2),
    ]


class _Registrar:
    """Stands before the server while servicers register, to learn their names and look at their methods."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self.services: list[str] = []
        self.names: set[str] = set()

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        for method, handler in handlers.items():
            behaviour = method_of(handler)
            if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
                raise ValueError(f"{service}/{method} must be async: the edge never blocks")
            self.names.add(f"{service}/{method}")
        self.services.append(service)
        self.names.add(service)
        self._server.add_registered_method_handlers(service, handlers)


def _refuse_live_socket(address: str) -> None:
    """Refuses a Unix socket that somebody listens on: gRPC would remove it and take its place silently."""
    path = address.removeprefix("unix:").removeprefix("//")
    if not address.startswith("unix:"):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return  # nobody there: no file, or one that a dead process left behind
    raise BindError(f"cannot listen on {address}: another process does")
