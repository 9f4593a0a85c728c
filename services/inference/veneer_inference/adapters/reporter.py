"""Tells the registry what this replica holds and how its adapters do."""

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import grpc
import structlog

from veneer.trainer.v1 import adapter_service_pb2
from veneer_inference.domain.figures import Figures, FiguresByVersion
from veneer_inference.domain.registry import Registry, Release
from veneer_rpc.errors import VeneerError
from veneer_rpc.status import from_rpc_error

if TYPE_CHECKING:
    from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceAsyncStub

_TIMEOUT_S = 5.0
_log = structlog.get_logger(__name__)


class Reporter:
    """Reports now and then.

    Args:
        stub: of the trainer.
        replica: this replica's own name.
        model: `models/{model}`.
        registry: says which revision is followed.
        figures: of the answers since the report before.
        held: the versions that are loaded now.
        gone_back: is called when the registry's revision is below the one that was followed.
        every_s: seconds between two reports.
    """

    def __init__(
        self,
        stub: "AdapterServiceAsyncStub",
        replica: str,
        model: str,
        registry: Registry,
        figures: FiguresByVersion,
        held: Callable[[], Iterable[Release]],
        gone_back: Callable[[], None],
        every_s: float,
    ) -> None:
        self._stub = stub
        self._replica = replica
        self._model = model
        self._registry = registry
        self._figures = figures
        self._held = held
        self._gone_back = gone_back
        self._every_s = every_s
        self.address = ""

    async def run(self) -> None:
        """Reports for ever; what could not be reported goes with the next report."""
        while True:
            try:
                await self.report()
            except VeneerError as error:
                _log.warning("not reported", reason=error.reason, problem=error.message)
            except Exception:
                _log.exception("report failed")
            await asyncio.sleep(self._every_s)

    async def report(self, *, draining: bool = False) -> int:
        """Reports once; returns the registry's present revision.

        Raises:
            VeneerError: the trainer refused or is away.
        """
        followed, taken = self._registry.revision, self._figures.take()
        request = adapter_service_pb2.ReportServingRequest(
            replica=self._replica,
            address=self.address,
            model=self._model,
            revision=followed,
            served_adapters=[_row(each, taken.get(each, Figures())) for each in {*self._held(), *taken}],
            draining=draining,
        )
        request.measure_time.GetCurrentTime()
        try:
            response = await self._stub.ReportServing(request, timeout=_TIMEOUT_S)
        except BaseException as error:
            self._figures.give_back(taken)
            if isinstance(error, grpc.aio.AioRpcError):
                raise from_rpc_error(error) from None
            raise
        if response.revision < followed:
            self._gone_back()
        return response.revision


def _row(release: Release, figures: Figures) -> adapter_service_pb2.ServedAdapter:
    return adapter_service_pb2.ServedAdapter(
        adapter_version=str(release.version),
        digest=release.digest,
        tenant=release.tenant,
        answered=figures.answered,
        failed=figures.failed,
        latency_p95_ms=figures.latency_p95_s() * 1000,
    )
