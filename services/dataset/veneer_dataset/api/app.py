"""What the edge hands calls over to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from veneer_dataset.adapters.models import TrainerModels
from veneer_dataset.adapters.sql.requests import SqlRequests
from veneer_dataset.api.works import Works
from veneer_dataset.domain.blobs import Blobs
from veneer_dataset.domain.examples import Examples
from veneer_dataset.ports import DatasetStore, PartialBlobs, VersionStore
from veneer_rpc.calls import serving_call
from veneer_rpc.idempotency import RequestKey, body_sha256, parse_request_id
from veneer_rpc.paging import Paginator
from veneer_rpc.threads import in_thread

_M = TypeVar("_M", bound=Message)


@dataclass(frozen=True, slots=True)
class App:
    """The parts of the process that calls need."""

    datasets: DatasetStore
    versions: VersionStore
    blobs: Blobs
    partial: PartialBlobs
    examples: Examples
    works: Works
    models: TrainerModels
    requests: SqlRequests
    pages: Paginator
    finding_pages: Paginator
    quota_bytes: int
    stall_s: float

    async def once(self, request: Message, kind: type[_M], act: Callable[[], _M]) -> _M:
        """Does a mutation in a thread; one with a request id that was done before is not done again."""
        request_id: str = request.request_id  # type: ignore[attr-defined]  # every mutation has one
        if not request_id:
            return await in_thread(act)
        key = request_key(request_id)
        digest = body_sha256(request)
        result = await in_thread(self.requests.once, key, digest, lambda: act().SerializeToString(deterministic=True))
        return kind.FromString(result)


def request_key(request_id: str) -> RequestKey:
    """The key of the call that is being served."""
    call = serving_call()
    return RequestKey(call.tenant, call.method, parse_request_id(request_id))


def tenant() -> str:
    """Whose call is being served."""
    return serving_call().tenant
