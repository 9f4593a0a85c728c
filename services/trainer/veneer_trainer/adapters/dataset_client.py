"""The dataset service over gRPC, asked for one tenant at a time under a delegation.

The domain calls from threads; the calls themselves run on the server's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
import structlog

from veneer.dataset.v1 import dataset_pb2, dataset_service_pb2, dataset_service_pb2_grpc
from veneer_rpc.errors import NotFound, Unavailable
from veneer_rpc.names import DatasetVersionName
from veneer_rpc.status import from_rpc_error
from veneer_trainer.ports import SplitFacts, VersionFacts

_T = TypeVar("_T")
_TIMEOUT_S = 10.0
_RETRY_S = 2.0
_log = structlog.get_logger(__name__)


class DatasetClient:
    """The Datasets behind a channel; see `ports.Datasets`.

    Args:
        channel: to the dataset service, without a credential.
        credential: makes one for a tenant.
        loop: where the channel lives; methods are called from other threads.
    """

    def __init__(
        self, channel: grpc.aio.Channel, credential: Callable[[str], str], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._service = dataset_service_pb2_grpc.DatasetServiceStub(channel)
        self._credential = credential
        self._loop = loop

    def version(self, tenant: str, name: DatasetVersionName) -> VersionFacts:
        """See Datasets."""
        request = dataset_service_pb2.GetDatasetVersionRequest(name=str(name))
        return _facts(name, self._call(tenant, self._service.GetDatasetVersion, request))

    def hold(self, tenant: str, name: DatasetVersionName, holder: str) -> None:
        """See Datasets."""
        request = dataset_service_pb2.PlaceHoldRequest(dataset_version=str(name), holder=holder)
        self._call(tenant, self._service.PlaceHold, request)

    def release(self, tenant: str, name: DatasetVersionName, holder: str) -> None:
        """See Datasets."""
        request = dataset_service_pb2.ReleaseHoldRequest(dataset_version=str(name), holder=holder)
        self._call(tenant, self._service.ReleaseHold, request)

    def _call(self, tenant: str, method: Any, request: Any) -> Any:  # noqa: ANN401  # generated, one of three
        metadata = (("authorization", f"Bearer {self._credential(tenant)}"),)

        async def ask() -> Any:  # noqa: ANN401  # as above
            return await method(request, timeout=_TIMEOUT_S, metadata=metadata)

        return self._wait(ask())

    def _wait(self, asking: Coroutine[Any, Any, _T]) -> _T:
        try:
            return asyncio.run_coroutine_threadsafe(asking, self._loop).result()
        except grpc.RpcError as error:
            problem = from_rpc_error(error)
            if isinstance(problem, NotFound):
                raise problem from error
            _log.warning("dataset service failed", reason=problem.reason, problem=problem.message)
            raise Unavailable(
                "DATASET_UNAVAILABLE", "the dataset service does not answer", retry_after_s=_RETRY_S
            ) from error


def _facts(name: DatasetVersionName, version: dataset_pb2.DatasetVersion) -> VersionFacts:
    report = version.report
    return VersionFacts(
        DatasetVersionName(name.dataset, version.digest or name.version),
        {split.split: _split(split) for split in version.splits},
        report.model,
        report.contract_digest,
        tuple((bucket.at_least_tokens, bucket.row_count) for bucket in report.length_histogram),
    )


def _split(split: dataset_pb2.Split) -> SplitFacts:
    if not split.HasField("tokens"):
        return SplitFacts(split.row_count)
    tokens = split.tokens
    return SplitFacts(split.row_count, tokens.visual, tokens.prompt, tokens.supervised, tokens.longest_row)
