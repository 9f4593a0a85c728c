"""Evaluations: a test split, asked of an adapter version or of the base; and people's verdicts."""

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from veneer.trainer.v1.evaluation_pb2 import Evaluation, EvaluationSpec, Judgement, Sample
from veneer.trainer.v1.evaluation_service_pb2 import (
    CancelEvaluationRequest,
    CreateEvaluationRequest,
    CreateJudgementRequest,
    DeleteEvaluationRequest,
    GetEvaluationRequest,
    ListEvaluationsRequest,
    ListJudgementsRequest,
    ListSamplesRequest,
    WatchEvaluationRequest,
)
from veneer.trainer.v1.evaluation_service_pb2_grpc import EvaluationServiceStub
from veneer.trainer.v1.training_job_pb2 import JobState
from veneer_client import _comparison
from veneer_client._calls import Connection
from veneer_client._comparison import Comparison
from veneer_client._datasets import AsyncDatasets
from veneer_client._errors import NotComparable
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

    async def compare(self, before: str, after: str) -> Comparison:
        """Holds two evaluations against each other, row by row.

        Args:
            before: an evaluation's name; or `digits@3` or `models/tiny`, for the newest that succeeded on rows that
                `after` was asked too.
            after: likewise.

        Raises:
            NotComparable: they share no rows or no metric.
        """
        old, new = await self._pair(before, after)
        olds, news = [each async for each in self.samples(old.name)], [each async for each in self.samples(new.name)]
        return _comparison.compare(old, new, olds, news)

    async def _pair(self, before: str, after: str) -> tuple[Evaluation, Evaluation]:
        olds, news = await self._candidates(before), await self._candidates(after)
        for new in news:
            for old in olds:
                if _rows(old) == _rows(new) and old.name != new.name:
                    return old, new
        if len(olds) == len(news) == 1:
            return olds[0], news[0]
        raise NotComparable(f"no two succeeded evaluations of {before} and {after} asked the same rows")

    async def _candidates(self, name: str) -> Sequence[Evaluation]:
        """An evaluation, or those that succeeded of who answered, newest first."""
        if "@" not in name and not name.startswith(("adapters/", "models/")):
            return [succeeded(await self.get(name))]
        found = [each async for each in self.list(subject=_who(name))]
        return [each for each in found if each.state == JobState.JOB_STATE_SUCCEEDED]

    async def judge(
        self,
        subject: str,
        score: float,
        *,
        other: str = "",
        evaluation: str = "",
        sample_index: int = 0,
        comment: str = "",
        request_id: str = "",
    ) -> Judgement:
        """Records a person's verdict on an answer, or on two answers to one question.

        Args:
            subject: who gave the answer: `digits@3`, or `models/tiny`.
            score: 1 right or better, 0 wrong or worse, or between.
            other: who gave the other answer.
            evaluation: where the answer is a sample's: of which evaluation.
            sample_index: and which sample.
            comment: the person's words.
            request_id: a UUID of yours. Default: made here.
        """
        judgement = Judgement(
            subject=_who(subject),
            score=score,
            other_subject=_who(other) if other else "",
            evaluation=full("evaluations", evaluation) if evaluation else "",
            sample_index=sample_index,
            comment=comment,
        )
        request = CreateJudgementRequest(judgement=judgement, request_id=request_id)
        return await self._trainer.change(self._stub().CreateJudgement, request)

    async def judgements(self, *, subject: str = "") -> AsyncIterator[Judgement]:
        """Yields people's verdicts, newest first; only those on one version or base when given."""
        request = ListJudgementsRequest(subject=_who(subject) if subject else "")
        async for item in self._trainer.pages(self._stub().ListJudgements, request, lambda page: page.judgements):
            yield item

    async def cancel(self, name: str) -> Evaluation:
        """Stops an evaluation for good; the samples so far stay."""
        request = CancelEvaluationRequest(name=full("evaluations", name))
        return await self._trainer.change(self._stub().CancelEvaluation, request)

    async def delete(self, name: str) -> None:
        """Deletes an evaluation that has ended, with its samples."""
        request = DeleteEvaluationRequest(name=full("evaluations", name))
        await self._trainer.change(self._stub().DeleteEvaluation, request)


def _who(name: str) -> str:
    return name if name.startswith("models/") else version("adapters", name)


def _rows(evaluation: Evaluation) -> tuple[str, str, int, str]:
    """What must be equal for two evaluations to have asked the same."""
    spec = evaluation.spec
    return spec.dataset_version, spec.split, spec.max_samples, spec.prompt
