"""TrainerService at the edge: convert, call in a thread, convert back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from veneer.trainer.v1 import training_job_pb2, training_service_pb2, training_service_pb2_grpc
from veneer_rpc.calls import serving_call
from veneer_rpc.errors import Violation, invalid
from veneer_rpc.names import AdapterName, TrainingJobName
from veneer_rpc.paging import Paginator, Query
from veneer_rpc.threads import in_thread
from veneer_trainer.api.changes import Changes, changed
from veneer_trainer.api.job_convert import estimate_to_proto, job_to_proto, point_to_proto, states_from_proto
from veneer_trainer.api.requests import request_of
from veneer_trainer.api.spec_convert import spec_from_proto, spec_to_proto
from veneer_trainer.domain.requests import Request
from veneer_trainer.domain.training import JobView, NewJob, TrainingJobs

_pb = training_service_pb2
_Context = grpc.aio.ServicerContext[Any, Any]
_DEFAULT_POINTS, _MOST_POINTS = 1000, 10_000
_LOOK_S = 1.0  # a watcher looks so often by itself, should it miss a wake-up


class TrainingServicer(training_service_pb2_grpc.TrainerServiceServicer):
    """The methods say what they do in the contract.

    Args:
        jobs: the use cases.
        paginator: makes pages.
        changes: wakes watchers.
    """

    def __init__(self, jobs: TrainingJobs, paginator: Paginator, changes: Changes) -> None:
        self._jobs = jobs
        self._paginator = paginator
        self._changes = changes

    async def EstimateTrainingJob(  # noqa: D102  # the contract says it
        self, request: _pb.EstimateTrainingJobRequest, context: _Context
    ) -> training_job_pb2.TrainingEstimate:
        spec = spec_from_proto(request.spec, adapter_required=False)
        return estimate_to_proto(await in_thread(self._jobs.estimate, serving_call().tenant, spec))

    async def CreateTrainingJob(  # noqa: D102  # the contract says it
        self, request: _pb.CreateTrainingJobRequest, context: _Context
    ) -> training_job_pb2.TrainingJob:
        job = request.training_job
        spec = spec_from_proto(job.spec, "training_job.spec")
        new = NewJob(request.training_job_id, spec, job.display_name, dict(job.labels))
        if request.validate_only:
            order = await in_thread(self._jobs.validate, serving_call().tenant, new)
            return training_job_pb2.TrainingJob(
                display_name=order.display_name,
                labels=order.labels,
                spec=spec_to_proto(order.spec),
                estimate=estimate_to_proto(order.estimate),
            )
        return job_to_proto(await in_thread(self._jobs.create, request_of(request), new))

    async def GetTrainingJob(  # noqa: D102  # the contract says it
        self, request: _pb.GetTrainingJobRequest, context: _Context
    ) -> training_job_pb2.TrainingJob:
        name = TrainingJobName.parse(request.name)
        return job_to_proto(await in_thread(self._jobs.get, serving_call().tenant, name))

    async def ListTrainingJobs(  # noqa: D102  # the contract says it
        self, request: _pb.ListTrainingJobsRequest, context: _Context
    ) -> _pb.ListTrainingJobsResponse:
        tenant, states = serving_call().tenant, states_from_proto(request.states)
        adapter = AdapterName.parse(request.adapter, "adapter") if request.adapter else None
        wanted = ",".join(sorted(state.value for state in states))
        query = Query("ListTrainingJobs", tenant, parent=request.adapter, filter=wanted)

        def fetch(after: tuple[str | int, ...] | None, limit: int) -> list[JobView]:
            older = None if after is None else (float(after[0]), str(after[1]))
            return self._jobs.page(tenant, older, limit, states, adapter)

        def page() -> _pb.ListTrainingJobsResponse:
            found = self._paginator.page(query, request.page_size, request.page_token, fetch, _cursor)
            return _pb.ListTrainingJobsResponse(
                training_jobs=map(job_to_proto, found.items), next_page_token=found.next_page_token
            )

        return await in_thread(page)

    async def DeleteTrainingJob(  # noqa: D102  # the contract says it
        self, request: _pb.DeleteTrainingJobRequest, context: _Context
    ) -> Empty:
        name = TrainingJobName.parse(request.name)
        await in_thread(self._jobs.delete, serving_call().tenant, name)
        return Empty()

    async def CancelTrainingJob(  # noqa: D102  # the contract says it
        self, request: _pb.CancelTrainingJobRequest, context: _Context
    ) -> training_job_pb2.TrainingJob:
        return await _steer(self._jobs.cancel, request)

    async def PauseTrainingJob(  # noqa: D102  # the contract says it
        self, request: _pb.PauseTrainingJobRequest, context: _Context
    ) -> training_job_pb2.TrainingJob:
        return await _steer(self._jobs.pause, request)

    async def ResumeTrainingJob(  # noqa: D102  # the contract says it
        self, request: _pb.ResumeTrainingJobRequest, context: _Context
    ) -> training_job_pb2.TrainingJob:
        return await _steer(self._jobs.resume, request)

    async def RetryTrainingJob(  # noqa: D102  # the contract says it
        self, request: _pb.RetryTrainingJobRequest, context: _Context
    ) -> training_job_pb2.TrainingJob:
        return await _steer(self._jobs.retry, request)

    async def WatchTrainingJob(  # noqa: D102  # the contract says it
        self, request: _pb.WatchTrainingJobRequest, context: _Context
    ) -> AsyncIterator[_pb.WatchTrainingJobResponse]:
        name, told = TrainingJobName.parse(request.name), request.after_revision
        if told < 0:
            raise invalid(Violation("after_revision", "OUT_OF_RANGE", f"must be 0 or more, was {told}"))
        tenant = serving_call().tenant
        view = await in_thread(self._jobs.get, tenant, name)
        with self._changes.of(view.job.work.uid) as event:
            while True:
                event.clear()
                view = await in_thread(self._jobs.get, tenant, name)
                if view.job.work.revision > told:
                    told = view.job.work.revision
                    yield _pb.WatchTrainingJobResponse(training_job=job_to_proto(view))
                if view.job.work.state.terminal:
                    return
                await changed(event, _LOOK_S)

    async def GetTrainingCurve(  # noqa: D102  # the contract says it
        self, request: _pb.GetTrainingCurveRequest, context: _Context
    ) -> _pb.TrainingCurve:
        name, most = TrainingJobName.parse(request.name), request.max_points or _DEFAULT_POINTS
        if not 2 <= most <= _MOST_POINTS:
            text = f"must be at least 2, at most {_MOST_POINTS}, was {most}"
            raise invalid(Violation("max_points", "OUT_OF_RANGE", text))
        points = await in_thread(self._jobs.curve, serving_call().tenant, name, most)
        return _pb.TrainingCurve(points=map(point_to_proto, points))


async def _steer(act: Callable[[Request, TrainingJobName], JobView], request: Any) -> training_job_pb2.TrainingJob:  # noqa: ANN401  # one of four messages with a name and a request id
    name = TrainingJobName.parse(request.name)
    return job_to_proto(await in_thread(act, request_of(request), name))


def _cursor(view: JobView) -> tuple[str | int, ...]:
    return repr(view.job.work.created_s), view.job.work.uid
