"""`grpc.health.v1.Health`, per service and true: NOT_SERVING at first and at last.

grpcio's own servicer starts with SERVING, and its watchers hold up a graceful stop for the whole grace.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # generated

from veneer_rpc.errors import NotFound

SERVICE = "grpc.health.v1.Health"
_Status = health_pb2.HealthCheckResponse
_Context = grpc.aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # untyped base
    """The state of each service of a process; the empty name stands for all of them together."""

    def __init__(self, services: Iterable[str]) -> None:
        self._serving = dict.fromkeys(services, False)
        self._stopping = False
        self._changed = asyncio.Event()

    def set_serving(self, service: str, serving: bool) -> None:
        """Says whether a service can do its work now. After `stop` the answer stays no.

        Raises:
            KeyError: the process has no such service.
        """
        if service not in self._serving:
            raise KeyError(f"no service {service!r} here, only {sorted(self._serving)}")
        self._serving[service] = serving
        self._wake()

    def stop(self) -> None:
        """Turns every service to NOT_SERVING for good, and ends the watchers once they have heard of it."""
        self._stopping = True
        self._wake()

    async def Check(  # noqa: D102  # the contract says it
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            raise NotFound("SERVICE_UNKNOWN", f"this process has no service {request.service[:200]!r}")
        return _Status(status=status)

    async def Watch(  # noqa: D102  # the contract says it
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told = None
        while True:
            changed, stopping = self._changed, self._stopping
            status = self._status(request.service)
            if status != told:
                yield _Status(status=status)
                told = status
            if stopping:
                return
            await changed.wait()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service and service not in self._serving:
            return _Status.SERVICE_UNKNOWN
        serving = self._serving[service] if service else bool(self._serving) and all(self._serving.values())
        return _Status.SERVING if serving and not self._stopping else _Status.NOT_SERVING

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
