"""EvaluationService at the edge: convert, call in a thread, convert back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from veneer.trainer.v1 import evaluation_pb2, evaluation_service_pb2, evaluation_service_pb2_grpc
from veneer_rpc.calls import serving_call
from veneer_rpc.errors import Violation, invalid
from veneer_rpc.names import EvaluationName
from veneer_rpc.paging import Paginator, Query
from veneer_rpc.threads import in_thread
from veneer_trainer.api.changes import Changes, changed
from veneer_trainer.api.evaluation_convert import (
    evaluation_to_proto,
    judgement_from_proto,
    judgement_to_proto,
    sample_to_proto,
    spec_from_proto,
)
from veneer_trainer.api.job_convert import age_of, number_of
from veneer_trainer.api.requests import request_of
from veneer_trainer.domain.evaluating import Evaluations
from veneer_trainer.domain.evaluations import Evaluation, Judgement, Sample

_pb = evaluation_service_pb2
_Context = grpc.aio.ServicerContext[Any, Any]
_LOOK_S = 1.0  # a watcher looks so often by itself, should it miss a wake-up


class EvaluationServicer(evaluation_service_pb2_grpc.EvaluationServiceServicer):
    """The methods say what they do in the contract.

    Args:
        evaluations: the use cases.
        paginator: makes pages.
        changes: wakes watchers.
    """

    def __init__(self, evaluations: Evaluations, paginator: Paginator, changes: Changes) -> None:
        self._evaluations = evaluations
        self._paginator = paginator
        self._changes = changes

    async def CreateEvaluation(  # noqa: D102  # the contract says it
        self, request: _pb.CreateEvaluationRequest, context: _Context
    ) -> evaluation_pb2.Evaluation:
        spec, asked = spec_from_proto(request.spec), request_of(request)
        return evaluation_to_proto(await in_thread(self._evaluations.create, asked, spec))

    async def GetEvaluation(  # noqa: D102  # the contract says it
        self, request: _pb.GetEvaluationRequest, context: _Context
    ) -> evaluation_pb2.Evaluation:
        name = EvaluationName.parse(request.name)
        return evaluation_to_proto(await in_thread(self._evaluations.get, serving_call().tenant, name))

    async def ListEvaluations(  # noqa: D102  # the contract says it
        self, request: _pb.ListEvaluationsRequest, context: _Context
    ) -> _pb.ListEvaluationsResponse:
        tenant = serving_call().tenant
        query = Query("ListEvaluations", tenant, filter=request.subject)

        def fetch(after: tuple[str | int, ...] | None, limit: int) -> list[Evaluation]:
            return self._evaluations.page(tenant, age_of(after), limit, request.subject)

        def page() -> _pb.ListEvaluationsResponse:
            found = self._paginator.page(
                query, request.page_size, request.page_token, fetch,
                lambda each: (repr(each.work.created_s), each.work.uid),
            )  # fmt: skip
            return _pb.ListEvaluationsResponse(
                evaluations=map(evaluation_to_proto, found.items), next_page_token=found.next_page_token
            )

        return await in_thread(page)

    async def CancelEvaluation(  # noqa: D102  # the contract says it
        self, request: _pb.CancelEvaluationRequest, context: _Context
    ) -> evaluation_pb2.Evaluation:
        name, asked = EvaluationName.parse(request.name), request_of(request)
        return evaluation_to_proto(await in_thread(self._evaluations.cancel, asked, name))

    async def DeleteEvaluation(  # noqa: D102  # the contract says it
        self, request: _pb.DeleteEvaluationRequest, context: _Context
    ) -> Empty:
        name = EvaluationName.parse(request.name)
        await in_thread(self._evaluations.delete, serving_call().tenant, name)
        return Empty()

    async def WatchEvaluation(  # noqa: D102  # the contract says it
        self, request: _pb.WatchEvaluationRequest, context: _Context
    ) -> AsyncIterator[_pb.WatchEvaluationResponse]:
        name, told, tenant = EvaluationName.parse(request.name), request.after_revision, serving_call().tenant
        if told < 0:
            raise invalid(Violation("after_revision", "OUT_OF_RANGE", f"must be 0 or more, was {told}"))
        view = await in_thread(self._evaluations.get, tenant, name)
        with self._changes.of(view.work.uid) as event:
            while True:
                event.clear()
                view = await in_thread(self._evaluations.get, tenant, name)
                if view.work.revision > told:
                    told = view.work.revision
                    yield _pb.WatchEvaluationResponse(evaluation=evaluation_to_proto(view))
                if view.work.state.terminal:
                    return
                await changed(event, _LOOK_S)

    async def ListSamples(  # noqa: D102  # the contract says it
        self, request: _pb.ListSamplesRequest, context: _Context
    ) -> _pb.ListSamplesResponse:
        parent, tenant = EvaluationName.parse(request.parent, "parent"), serving_call().tenant
        query = Query("ListSamples", tenant, parent=str(parent), filter=str(request.only_misses))

        def fetch(after: tuple[str | int, ...] | None, limit: int) -> list[Sample]:
            last = number_of(after)
            return self._evaluations.samples(tenant, parent, -1 if last is None else last, limit, request.only_misses)

        def page() -> _pb.ListSamplesResponse:
            found = self._paginator.page(
                query, request.page_size, request.page_token, fetch, lambda each: (each.index,)
            )
            return _pb.ListSamplesResponse(
                samples=map(sample_to_proto, found.items), next_page_token=found.next_page_token
            )

        return await in_thread(page)

    async def CreateJudgement(  # noqa: D102  # the contract says it
        self, request: _pb.CreateJudgementRequest, context: _Context
    ) -> evaluation_pb2.Judgement:
        judgement, asked = judgement_from_proto(request.judgement), request_of(request)
        return judgement_to_proto(await in_thread(self._evaluations.judge, asked, judgement))

    async def ListJudgements(  # noqa: D102  # the contract says it
        self, request: _pb.ListJudgementsRequest, context: _Context
    ) -> _pb.ListJudgementsResponse:
        tenant = serving_call().tenant
        query = Query("ListJudgements", tenant, filter=request.subject)

        def fetch(after: tuple[str | int, ...] | None, limit: int) -> list[Judgement]:
            return self._evaluations.judgements(tenant, age_of(after), limit, request.subject)

        def page() -> _pb.ListJudgementsResponse:
            found = self._paginator.page(
                query, request.page_size, request.page_token, fetch, lambda each: (repr(each.created_s), each.uid)
            )
            return _pb.ListJudgementsResponse(
                judgements=map(judgement_to_proto, found.items), next_page_token=found.next_page_token
            )

        return await in_thread(page)
