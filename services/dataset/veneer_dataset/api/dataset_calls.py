"""Calls about datasets."""

from typing import Any

from google.protobuf.empty_pb2 import Empty

from veneer.dataset.v1 import dataset_pb2, dataset_service_pb2
from veneer_dataset.api.app import App, tenant
from veneer_dataset.api.convert import dataset_message
from veneer_dataset.domain.datasets import changed, new_dataset, now
from veneer_rpc.errors import Violation, invalid
from veneer_rpc.names import DatasetName
from veneer_rpc.paging import Query
from veneer_rpc.threads import in_thread

_CHANGEABLE = ("display_name", "default_prompt", "labels")


class DatasetCalls:
    """See the contract."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def CreateDataset(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.CreateDatasetRequest, context: object
    ) -> dataset_pb2.Dataset:
        name = DatasetName.parse(f"datasets/{request.dataset_id}", "dataset_id")
        sent = request.dataset
        dataset = new_dataset(name.dataset, sent.display_name, sent.default_prompt, dict(sent.labels))
        whose = tenant()
        return await self._app.once(
            request, dataset_pb2.Dataset, lambda: dataset_message(self._app.datasets.insert(whose, dataset))
        )

    async def GetDataset(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.GetDatasetRequest, context: object
    ) -> dataset_pb2.Dataset:
        name = DatasetName.parse(request.name)
        return dataset_message(await in_thread(self._app.datasets.get, tenant(), name.dataset))

    async def ListDatasets(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.ListDatasetsRequest, context: object
    ) -> dataset_service_pb2.ListDatasetsResponse:
        whose = tenant()
        page = await in_thread(
            self._app.pages.page,
            Query("ListDatasets", whose),
            request.page_size,
            request.page_token,
            lambda after, limit: self._app.datasets.page(whose, int(after[0]) if after else None, limit),
            lambda item: (item[0],),
        )
        return dataset_service_pb2.ListDatasetsResponse(
            datasets=[dataset_message(dataset) for _, dataset in page.items], next_page_token=page.next_page_token
        )

    async def UpdateDataset(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.UpdateDatasetRequest, context: object
    ) -> dataset_pb2.Dataset:
        name = DatasetName.parse(request.dataset.name, "dataset.name")
        changes = _changes(request)
        whose = tenant()

        def act() -> dataset_pb2.Dataset:
            new = changed(self._app.datasets.get(whose, name.dataset), changes)
            return dataset_message(self._app.datasets.replace(whose, new, request.dataset.etag))

        return await self._app.once(request, dataset_pb2.Dataset, act)

    async def DeleteDataset(  # noqa: D102  # the contract says it
        self, request: dataset_service_pb2.DeleteDatasetRequest, context: object
    ) -> Empty:
        name = DatasetName.parse(request.name)
        await in_thread(self._app.datasets.delete, tenant(), name.dataset, request.etag, now())
        return Empty()


def _changes(request: dataset_service_pb2.UpdateDatasetRequest) -> dict[str, Any]:
    paths = list(request.update_mask.paths) or [each for each in _CHANGEABLE if getattr(request.dataset, each)]
    unknown = [path for path in paths if path not in _CHANGEABLE]
    if unknown:
        raise invalid(
            *(
                Violation("update_mask", "UNKNOWN_PATH", f"{path[:80]!r} is none of {', '.join(_CHANGEABLE)}")
                for path in unknown
            )
        )
    sent = request.dataset
    values = {
        "display_name": sent.display_name,
        "default_prompt": sent.default_prompt,
        "labels": dict(sent.labels),
    }
    return {path: values[path] for path in paths}
