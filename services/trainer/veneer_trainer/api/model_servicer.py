"""ModelService at the edge: what the operator installed, and its small files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc

from veneer.trainer.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from veneer_rpc.calls import serving_call
from veneer_rpc.names import ModelName
from veneer_rpc.paging import Paginator, Query
from veneer_trainer.api.adapter_convert import files_to_proto
from veneer_trainer.api.downloads import pieces
from veneer_trainer.api.job_convert import contract_to_proto, timestamp
from veneer_trainer.domain.registry import chosen
from veneer_trainer.domain.replicas import Replicas
from veneer_trainer.domain.workers import Workers
from veneer_trainer.registry_ports import ModelDetails, ModelShelf

_pb = model_service_pb2
_Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """The methods say what they do in the contract.

    Args:
        models: the bases.
        workers: who trains on them.
        replicas: who serves them.
        paginator: makes pages.
    """

    def __init__(self, models: ModelShelf, workers: Workers, replicas: Replicas, paginator: Paginator) -> None:
        self._models = models
        self._workers = workers
        self._replicas = replicas
        self._paginator = paginator

    async def ListModels(  # noqa: D102  # the contract says it
        self, request: _pb.ListModelsRequest, context: _Context
    ) -> _pb.ListModelsResponse:
        def fetch(after: tuple[str | int, ...] | None, limit: int) -> list[ModelDetails]:
            last = str(after[0]) if after else ""
            return [each for each in self._models.all() if str(each.base.name) > last][:limit]

        query = Query("ListModels", serving_call().tenant)
        found = self._paginator.page(
            query, request.page_size, request.page_token, fetch, lambda each: (str(each.base.name),)
        )
        return _pb.ListModelsResponse(models=map(self._to_proto, found.items), next_page_token=found.next_page_token)

    async def GetModel(  # noqa: D102  # the contract says it
        self, request: _pb.GetModelRequest, context: _Context
    ) -> model_pb2.Model:
        return self._to_proto(self._models.details(ModelName.parse(request.name)))

    async def DownloadModelFiles(  # noqa: D102  # the contract says it
        self, request: _pb.DownloadModelFilesRequest, context: _Context
    ) -> AsyncIterator[_pb.DownloadModelFilesResponse]:
        name = ModelName.parse(request.name)
        files = chosen(self._models.details(name).files, tuple(request.paths), str(name))
        async for file, offset, data in pieces(files, partial(self._models.read, name)):
            message = model_pb2.ModelFile(path=file.path, digest=file.digest, size_bytes=file.size_bytes)
            yield _pb.DownloadModelFilesResponse(file=message, offset_bytes=offset, data=data)

    def _to_proto(self, details: ModelDetails) -> model_pb2.Model:
        name, digest = str(details.base.name), details.base.digest
        workers = [worker for worker in self._workers.known() if worker.models.get(name) == digest]
        dtypes = {f"DTYPE_{dtype.upper()}" for worker in workers for dtype in worker.dtypes}
        return model_pb2.Model(
            name=name,
            digest=digest,
            model_class=details.model_class,
            contract=contract_to_proto(details.contract),
            parameter_count=details.parameter_count,
            context_length=details.base.context_length,
            dtypes=sorted(number for dtype, number in model_pb2.Dtype.items() if dtype in dtypes),
            linear_groups=[
                model_pb2.LinearGroup(group=group, target_modules=names) for group, names in details.linears.items()
            ],
            workers=[worker.name for worker in workers],
            replicas=[
                replica.name for replica in self._replicas.known() if replica.model == name and not replica.draining
            ],
            files=files_to_proto(details.files),
            create_time=timestamp(details.created_s),
        )
