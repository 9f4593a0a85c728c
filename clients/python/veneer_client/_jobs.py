"""Training jobs."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from veneer.trainer.v1.training_job_pb2 import (
    CoTrain,
    JobState,
    TrainingEstimate,
    TrainingJob,
    TrainingProgress,
    TrainingSpec,
)
from veneer.trainer.v1.training_service_pb2 import (
    CancelTrainingJobRequest,
    CreateTrainingJobRequest,
    DeleteTrainingJobRequest,
    EstimateTrainingJobRequest,
    GetTrainingCurveRequest,
    GetTrainingJobRequest,
    ListTrainingJobsRequest,
    PauseTrainingJobRequest,
    ResumeTrainingJobRequest,
    RetryTrainingJobRequest,
    WatchTrainingJobRequest,
)
from veneer.trainer.v1.training_service_pb2_grpc import TrainerServiceStub
from veneer_client._adapters import AsyncAdapters
from veneer_client._calls import Connection
from veneer_client._datasets import AsyncDatasets
from veneer_client._models import AsyncModels
from veneer_client._names import full
from veneer_client._sweep import combinations
from veneer_client._work import last, succeeded

if TYPE_CHECKING:  # the generated code has it in its type stubs alone
    from veneer.trainer.v1.training_service_pb2_grpc import TrainerServiceAsyncStub


class AsyncJobs:
    """Training jobs."""

    def __init__(
        self, trainer: Connection, datasets: AsyncDatasets, models: AsyncModels, adapters: AsyncAdapters
    ) -> None:
        self._trainer = trainer
        self._datasets = datasets
        self._adapters = adapters
        self._models = models

    def _stub(self) -> "TrainerServiceAsyncStub":
        return self._trainer.stub(TrainerServiceStub)

    async def train(
        self,
        dataset: str,
        adapter: str,
        *,
        model: str | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        target_modules: Sequence[str] = (),
        learning_rate: float | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        max_pixels: int | None = None,
        seed: int | None = None,
        start_from: str = "",
        spec: TrainingSpec | None = None,
        validate_only: bool = False,
        job_id: str = "",
        request_id: str = "",
    ) -> TrainingJob:
        """Queues a job; once this returns, the job is not lost. What is not given has the service's default.

        Args:
            dataset: `digits` for the newest version, `digits@<digest>` for another.
            adapter: gets the new version; created when it does not exist.
            model: the base. Default: the only one there is.
            epochs: passes over the data; give this or `steps`.
            steps: optimiser steps.
            rank: of the low-rank update.
            alpha: the update is scaled by alpha / rank.
            target_modules: names as PEFT takes them, or one preset: `attention`, `decoder`, `decoder+merger`,
                `decoder+merger+vision`.
            learning_rate: the greatest one.
            batch_size: rows whose gradients are computed together.
            max_length: greatest length of a row in tokens.
            max_pixels: bound on a picture's area.
            seed: of shuffle, initial weights and dropout.
            start_from: an adapter version to continue, such as `digits@2` or `digits@production`. The job must have
                its rank, alpha and targets, and has them where neither `rank`, `alpha`, `target_modules` nor a `lora`
                in `spec` is given.
            spec: everything else that the contract offers; the arguments above win over it.
            validate_only: checks and estimates, queues nothing.
            job_id: the job's own id. Default: made by the service.
            request_id: a UUID of yours, so that the same order sent twice is one job. Default: made here.
        """
        order = TrainingSpec()
        if spec is not None:
            order.CopyFrom(spec)
        order.dataset_version = (await self._datasets.get_version(dataset)).name
        order.adapter = full("adapters", adapter)
        order.model = await self._models.name_or_only(model or order.model)
        given = {"batch_size": batch_size, "max_length": max_length, "max_pixels": max_pixels, "seed": seed}
        given |= {"epochs": epochs, "steps": steps}
        for field, value in given.items():
            if value is not None:
                setattr(order, field, value)
        if start_from:
            initial = await self._adapters.get_version(start_from)
            order.initial_adapter_version = initial.name
            if not order.HasField("lora"):
                order.lora.CopyFrom(initial.lora)
        if rank is not None:
            order.lora.rank = rank
        if alpha is not None:
            order.lora.alpha = alpha
        if target_modules:
            order.lora.target_modules[:] = target_modules
        if learning_rate is not None:
            order.optimizer.learning_rate = learning_rate
        request = CreateTrainingJobRequest(
            training_job_id=job_id,
            training_job=TrainingJob(spec=order),
            validate_only=validate_only,
            request_id=request_id,
        )
        return await self._trainer.change(self._stub().CreateTrainingJob, request)

    async def sweep(
        self,
        /,
        dataset: str,
        adapter: str,
        axes: Mapping[str, Sequence[float]],
        *,
        validate_only: bool = False,
        **order: Any,  # noqa: ANN401  # of `train`
    ) -> Sequence[TrainingJob]:
        """Queues one job for every combination of settings; each publishes a version of the adapter.

        All are checked before the first is queued. They may share passes over the base, unless `spec` says otherwise.
        `veneer_client.compared` sets them side by side once they ended.

        Args:
            dataset: as in `train`.
            adapter: as in `train`.
            axes: values to try, such as `{"rank": [8, 16], "learning_rate": [1e-4, 2e-4]}`.
            validate_only: checks and estimates, queues nothing.
            **order: everything else that `train` takes.

        Raises:
            ValueError: the axes are not those of a sweep.
        """
        spec = TrainingSpec(co_train=CoTrain.CO_TRAIN_ALLOWED)
        spec.MergeFrom(order.pop("spec", None) or TrainingSpec())
        orders = [order | chosen | {"spec": spec} for chosen in combinations(axes)]
        checked = [await self.train(dataset, adapter, validate_only=True, **each) for each in orders]
        return checked if validate_only else [await self.train(dataset, adapter, **each) for each in orders]

    async def estimate(self, spec: TrainingSpec) -> TrainingEstimate:
        """Says what a job would take."""
        return await self._trainer.read(self._stub().EstimateTrainingJob, EstimateTrainingJobRequest(spec=spec))

    async def get(self, name: str) -> TrainingJob:
        """Returns a job."""
        request = GetTrainingJobRequest(name=full("trainingJobs", name))
        return await self._trainer.read(self._stub().GetTrainingJob, request)

    async def list(self, *, states: Sequence[JobState.ValueType] = (), adapter: str = "") -> AsyncIterator[TrainingJob]:
        """Yields jobs, newest first; only those in one of the states, or for one adapter, when given."""
        request = ListTrainingJobsRequest(states=states, adapter=full("adapters", adapter) if adapter else "")
        async for item in self._trainer.pages(self._stub().ListTrainingJobs, request, lambda page: page.training_jobs):
            yield item

    async def watch(self, name: str) -> AsyncIterator[TrainingJob]:
        """Yields snapshots of a job until it has ended; goes on after the last when the line breaks."""
        request = WatchTrainingJobRequest(name=full("trainingJobs", name))
        async for job in self._trainer.follow(
            self._stub().WatchTrainingJob, request, lambda message: message.training_job
        ):
            yield job

    async def curve(self, name: str, *, max_points: int = 1000) -> Sequence[TrainingProgress]:
        """Returns the course of a job's figures by growing step, thinned to about so many points."""
        request = GetTrainingCurveRequest(name=full("trainingJobs", name), max_points=max_points)
        return (await self._trainer.read(self._stub().GetTrainingCurve, request)).points

    async def wait(self, name: str) -> TrainingJob:
        """Waits for a job and returns it when it succeeded.

        Raises:
            WorkFailed: it ended in another way.
        """
        return succeeded(await last(self.watch(name)))

    async def cancel(self, name: str) -> TrainingJob:
        """Stops a job for good, within a step."""
        request = CancelTrainingJobRequest(name=full("trainingJobs", name))
        return await self._trainer.change(self._stub().CancelTrainingJob, request)

    async def pause(self, name: str) -> TrainingJob:
        """Stops a job after a checkpoint, until it is resumed."""
        request = PauseTrainingJobRequest(name=full("trainingJobs", name))
        return await self._trainer.change(self._stub().PauseTrainingJob, request)

    async def resume(self, name: str) -> TrainingJob:
        """Queues a paused job again."""
        request = ResumeTrainingJobRequest(name=full("trainingJobs", name))
        return await self._trainer.change(self._stub().ResumeTrainingJob, request)

    async def retry(self, name: str) -> TrainingJob:
        """Queues a failed or dead-lettered job again from its last good checkpoint."""
        request = RetryTrainingJobRequest(name=full("trainingJobs", name))
        return await self._trainer.change(self._stub().RetryTrainingJob, request)

    async def delete(self, name: str) -> None:
        """Forgets a job that has ended; its adapter version stays."""
        request = DeleteTrainingJobRequest(name=full("trainingJobs", name))
        await self._trainer.change(self._stub().DeleteTrainingJob, request)
