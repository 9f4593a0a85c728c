"""Base models."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from veneer.trainer.v1.model_pb2 import Model
from veneer.trainer.v1.model_service_pb2 import GetModelRequest, ListModelsRequest
from veneer.trainer.v1.model_service_pb2_grpc import ModelServiceStub
from veneer_client._calls import Connection
from veneer_client._errors import FailedPrecondition
from veneer_client._names import full

if TYPE_CHECKING:  # the generated code has it in its type stubs alone
    from veneer.trainer.v1.model_service_pb2_grpc import ModelServiceAsyncStub


class AsyncModels:
    """The base models that the cluster holds."""

    def __init__(self, trainer: Connection) -> None:
        self._trainer = trainer

    def _stub(self) -> "ModelServiceAsyncStub":
        return self._trainer.stub(ModelServiceStub)

    async def get(self, name: str) -> Model:
        """Returns a model."""
        return await self._trainer.read(self._stub().GetModel, GetModelRequest(name=full("models", name)))

    async def list(self) -> AsyncIterator[Model]:
        """Yields all models, by name."""
        request = ListModelsRequest()
        async for item in self._trainer.pages(self._stub().ListModels, request, lambda page: page.models):
            yield item

    async def name_or_only(self, name: str | None) -> str:
        """Returns a model's full name; without one, that of the only model there is.

        Raises:
            FailedPrecondition: none was named, and there is not just one.
        """
        if name:
            return full("models", name)
        names = [model.name async for model in self.list()]
        if len(names) != 1:
            which = ", ".join(names) or "none"
            raise FailedPrecondition("MODEL_NOT_NAMED", f"name the model to use; the cluster holds: {which}")
        return names[0]
