"""Evaluations: a test split, asked of an adapter version or of the base."""

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from veneer.trainer.v1.evaluation_pb2 import Evaluation, EvaluationSpec, Sample
from veneer.trainer.v1.evaluation_service_pb2 import (
    CancelEvaluationRequest,
    CreateEvaluationRequest,
    DeleteEvaluationRequest,
    GetEvaluationRequest,
    ListEvaluationsRequest,
    ListSamplesRequest,
    WatchEvaluationRequest,
)
from veneer.trainer.v1.evaluation_service_pb2_grpc import EvaluationServiceStub
from veneer_client._calls import Connection
from veneer_client._datasets import AsyncDatasets
from veneer_client._models import AsyncModels
from veneer_client._names import full, version
from veneer_client._work import last, succeeded

if TYPE_CHECKING:  # the generated code has it in its type stubs alone
    from veneer.trainer.v1.evaluation_service_pb2_grpc import EvaluationServiceAsyncStub


class AsyncEvaluations:
    """Evaluations."""

    def __init__(self, trainer: Connection, datasets: AsyncDatasets, models: AsyncModels) -> None:
        self._trainer = trainer
        self._datasets = datasets
        self._models = models

    def _stub(self) -> "EvaluationServiceAsyncStub":
        return self._trainer.stub(EvaluationServiceStub)

    async def create(
        self,
        dataset: str,
        *,
        adapter: str | None = None,
        model: str | None = None,
        split: str = "",
        prompt: str = "",
        max_samples: int = 0,
        max_tokens: int = 0,
        metrics: Sequence[str] = (),
        request_id: str = "",
    ) -> Evaluation:
        """Queues an evaluation.

        Args:
            dataset: `digits` for the newest version, `digits@<digest>` for another.
            adapter: who answers: `digits`, or `digits@3`. Default: the base alone.
            model: the base, where no adapter is named. Default: the only one there is.
            split: Default: `test`.
            prompt: replaces each row's question.
            max_samples: rows to ask. Default: all.
            max_tokens: of an answer. Default: by the longest expected one.
            metrics: such as `exact_match`. Default: what suits the rows.
            request_id: a UUID of yours. Default: made here.
        """
        subject = version("adapters", adapter) if adapter else await self._models.name_or_only(model)
        spec = EvaluationSpec(
            subject=subject,
            dataset_version=(await self._datasets.get_version(dataset)).name,
            split=split,
            prompt=prompt,
            max_samples=max_samples,
            max_tokens=max_tokens,
            metrics=metrics,
        )
        request = CreateEvaluationRequest(spec=spec, request_id=request_id)
        return await self._trainer.change(self._stub().CreateEvaluation, request)

    async def get(self, name: str) -> Evaluation:
        """Returns an evaluation."""
        request = GetEvaluationRequest(name=full("evaluations", name))
        return await self._trainer.read(self._stub().GetEvaluation, request)

    async def list(self, *, subject: str = "") -> AsyncIterator[Evaluation]:
        """Yields evaluations, newest first; only those of one version or base when given."""
        request = ListEvaluationsRequest(subject=subject)
        async for item in self._trainer.pages(self._stub().ListEvaluations, request, lambda page: page.evaluations):
            yield item

    async def watch(self, name: str) -> AsyncIterator[Evaluation]:
        """Yields snapshots of an evaluation until it has ended; goes on after the last one seen."""
        request = WatchEvaluationRequest(name=full("evaluations", name))
        async for item in self._trainer.follow(
            self._stub().WatchEvaluation, request, lambda message: message.evaluation
        ):
            yield item

    async def wait(self, name: str) -> Evaluation:
        """Waits for an evaluation and returns it when it succeeded.

        Raises:
            WorkFailed: it ended in another way.
        """
        return succeeded(await last(self.watch(name)))

    async def samples(self, name: str, *, only_misses: bool = False) -> AsyncIterator[Sample]:
        """Yields asked rows with their answers, by index."""
        request = ListSamplesRequest(parent=full("evaluations", name), only_misses=only_misses)
        async for item in self._trainer.pages(self._stub().ListSamples, request, lambda page: page.samples):
            yield item

    async def cancel(self, name: str) -> Evaluation:
        """Stops an evaluation for good; the samples so far stay."""
        request = CancelEvaluationRequest(name=full("evaluations", name))
        return await self._trainer.change(self._stub().CancelEvaluation, request)

    async def delete(self, name: str) -> None:
        """Deletes an evaluation that has ended, with its samples."""
        request = DeleteEvaluationRequest(name=full("evaluations", name))
        await self._trainer.change(self._stub().DeleteEvaluation, request)
