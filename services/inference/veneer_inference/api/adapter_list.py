"""The calls about what is loaded: list, load, unload. A tenant sees its own names alone."""

from veneer.inference.v1 import inference_pb2
from veneer_inference.admission import Admission
from veneer_inference.api import convert
from veneer_inference.api.engine_errors import engine_errors
from veneer_inference.domain.registry import AdapterRef
from veneer_inference.ports import AdapterState
from veneer_inference.residency import Holding, Residency
from veneer_rpc.calls import Call
from veneer_rpc.errors import NotFound
from veneer_rpc.names import AdapterVersionName
from veneer_rpc.paging import Cursor, Page, Paginator, Query


class AdapterList:
    """What is loaded on this replica.

    Args:
        admission: finds versions.
        residency: holds them.
        pages: gives lists out.
    """

    def __init__(self, admission: Admission, residency: Residency, pages: Paginator) -> None:
        self._admission = admission
        self._residency = residency
        self._pages = pages

    def page(self, call: Call, page_size: int, page_token: str) -> Page[inference_pb2.LoadedAdapter]:
        """One page of a tenant's versions, by adapter and number.

        Raises:
            InvalidArgument: the page is no page of this list.
        """
        held, loading = self._residency.holdings(call.tenant), self._residency.loading(call.tenant)
        ordered = sorted({*held, *loading}, key=_place)

        def fetch(after: Cursor | None, count: int) -> list[AdapterVersionName]:
            return [each for each in ordered if after is None or _place(each) > after][:count]

        page = self._pages.page(Query(call.method, call.tenant), page_size, page_token, fetch, _place)
        items = [
            _row(call.tenant, each, held[each])
            if each in held
            else convert.loaded_adapter(each, loading[each], inference_pb2.RESIDENCE_LOADING)
            for each in page.items
        ]
        return Page(items, page.next_page_token)

    async def load(self, tenant: str, name: AdapterRef) -> inference_pb2.LoadedAdapter:
        """Loads a version now; errors as `Admission.pin` and `Residency.ready`."""
        release = await self._admission.pin(tenant, name, "")
        with engine_errors():
            holding = await self._residency.ready(release)
        return _row(tenant, release.version, holding)

    async def unload(self, tenant: str, version: AdapterVersionName) -> None:
        """Drops a version.

        Raises:
            NotFound: it is not loaded here.
        """
        with engine_errors():
            if not await self._residency.drop(tenant, version, until_asked=True):
                raise NotFound("ADAPTER_NOT_LOADED", f"{version} is not loaded on this replica", resource=str(version))


def _place(version: AdapterVersionName) -> tuple[str, int]:
    return version.adapter, version.version


def _row(tenant: str, version: AdapterVersionName, holding: Holding) -> inference_pb2.LoadedAdapter:
    states = holding.base.engine.stats().adapters
    state = next((each for each in states if each.digest == holding.digest), AdapterState(holding.digest, False, 0, 0))
    return convert.loaded_adapter(
        version,
        holding.digest,
        inference_pb2.RESIDENCE_SLOT if state.in_slot else inference_pb2.RESIDENCE_HOST,
        state.active_requests,
        holding.size_bytes,
        holding.last_uses_s.get((tenant, version)),
        holding.load_time_s,
    )
