"""The inference service's calls: convert, call, convert back."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from veneer.inference.v1 import inference_pb2, inference_service_pb2
from veneer.inference.v1.inference_service_pb2_grpc import InferenceServiceServicer
from veneer_inference.api import convert, requests
from veneer_inference.api.adapter_list import AdapterList
from veneer_inference.api.answers import Answers
from veneer_inference.base import closed_in_the_end
from veneer_inference.domain.question import Question
from veneer_inference.ports import TokenScore
from veneer_rpc.calls import serving_call
from veneer_rpc.names import AdapterVersionName

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(InferenceServiceServicer):
    """See the contract.

    Args:
        answers: what is asked for.
        adapters: what is loaded.
        replica: this replica's own name.
    """

    def __init__(self, answers: Answers, adapters: AdapterList, replica: str) -> None:
        self._answers = answers
        self._adapters = adapters
        self._replica = replica

    async def Generate(  # noqa: D102  # the contract says it
        self, request: inference_service_pb2.GenerateRequest, context: _Context
    ) -> inference_service_pb2.GenerateResponse:
        question, draw = requests.question(request, self._answers.context_length)
        answer = await self._answers.answer(serving_call(), question, draw, _authorization(context))
        text: list[str] = []
        token_ids: list[int] = []
        scores: list[TokenScore] = []
        async with closed_in_the_end(answer.pieces) as pieces:
            async for piece in pieces:
                text.append(piece.text)
                token_ids += piece.token_ids
                scores += piece.scores
        return inference_service_pb2.GenerateResponse(
            text="".join(text),
            finish_reason=convert.FINISH[piece.finish],
            token_ids=token_ids,
            logprobs=convert.logprobs(scores, answer.pinned.base.token_bytes),
            usage=convert.usage(answer.counts, piece.cached_tokens, piece.answer_tokens),
            timings=convert.timings(piece),
            served_by=convert.served_by(answer.pinned, self._replica),
        )

    async def StreamGenerate(  # noqa: D102  # the contract says it
        self, request: inference_service_pb2.StreamGenerateRequest, context: _Context
    ) -> AsyncIterator[inference_service_pb2.StreamGenerateResponse]:
        question, draw = requests.question(request, self._answers.context_length)
        answer = await self._answers.answer(serving_call(), question, draw, _authorization(context))
        served_by = convert.served_by(answer.pinned, self._replica)
        first = True
        async with closed_in_the_end(answer.pieces) as pieces:
            async for piece in pieces:
                yield inference_service_pb2.StreamGenerateResponse(
                    text=piece.text,
                    token_ids=piece.token_ids,
                    logprobs=convert.logprobs(piece.scores, answer.pinned.base.token_bytes),
                    finish_reason=convert.FINISH[piece.finish],
                    usage=convert.usage(answer.counts, piece.cached_tokens, piece.answer_tokens),
                    timings=convert.timings(piece),
                    served_by=served_by if first or piece.finish else None,
                )
                first = False

    async def Score(  # noqa: D102  # the contract says it
        self, request: inference_service_pb2.ScoreRequest, context: _Context
    ) -> inference_service_pb2.ScoreResponse:
        question, top_logprobs = requests.score_question(request)
        pinned, read, scores = await self._answers.score(
            serving_call(), question, top_logprobs, _authorization(context)
        )
        supervised_T = read.prompt.supervised_T
        return inference_service_pb2.ScoreResponse(
            messages=convert.scored_messages(
                _supervised(question),
                [] if supervised_T is None else supervised_T.tolist(),
                scores,
                pinned.base.token_bytes,
            ),
            total_logprob=sum(score.logprob for score in scores),
            usage=convert.usage(read.counts),
            served_by=convert.served_by(pinned, self._replica),
        )

    async def CountTokens(  # noqa: D102  # the contract says it
        self, request: inference_service_pb2.CountTokensRequest, context: _Context
    ) -> inference_service_pb2.CountTokensResponse:
        question = requests.count_question(request)
        counts = await self._answers.count(serving_call(), question, _authorization(context))
        return inference_service_pb2.CountTokensResponse(
            total_tokens=counts.total, visual_tokens=counts.visual, supervised_tokens=counts.supervised
        )

    async def ListLoadedAdapters(  # noqa: D102  # the contract says it
        self, request: inference_service_pb2.ListLoadedAdaptersRequest, context: _Context
    ) -> inference_service_pb2.ListLoadedAdaptersResponse:
        page = self._adapters.page(serving_call(), request.page_size, request.page_token)
        return inference_service_pb2.ListLoadedAdaptersResponse(
            loaded_adapters=page.items, next_page_token=page.next_page_token
        )

    async def LoadAdapter(  # noqa: D102  # the contract says it
        self, request: inference_service_pb2.LoadAdapterRequest, context: _Context
    ) -> inference_pb2.LoadedAdapter:
        name = requests.adapter_name(request.adapter, "adapter")
        return await self._adapters.load(serving_call().tenant, name)

    async def UnloadAdapter(  # noqa: D102  # the contract says it
        self, request: inference_service_pb2.UnloadAdapterRequest, context: _Context
    ) -> Empty:
        await self._adapters.unload(
            serving_call().tenant, AdapterVersionName.parse(request.adapter_version, "adapter_version")
        )
        return Empty()

    async def GetModel(  # noqa: D102  # the contract says it
        self, request: inference_service_pb2.GetModelRequest, context: _Context
    ) -> inference_pb2.ResidentModel:
        return convert.resident_model(self._answers.base, self._replica)


def _supervised(question: Question) -> list[int]:
    return [
        index
        for index, message in enumerate(question.prompt.messages)
        if message.role == "assistant" and message.supervised
    ]


def _authorization(context: _Context) -> str:
    """The caller's own credential, for the dataset service; the interceptors have checked that there is one."""
    return str(dict(context.invocation_metadata() or ())["authorization"])
