"""Answers from inference replicas, held to the one version that was pinned."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence

import grpc

from veneer.inference.v1 import inference_pb2, inference_service_pb2, inference_service_pb2_grpc
from veneer.trainer.v1 import evaluation_pb2
from veneer_rpc import errors
from veneer_rpc.status import from_rpc_error
from veneer_trainer.worker.attempt import failure
from veneer_trainer.worker.connections import bearer
from veneer_trainer.worker.questions import Question
from veneer_trainer.worker.refusal import Refused

_CALL_S = 300.0
_AGAIN_S, _LONGEST_AGAIN_S = 0.2, 5.0
_LAG_S = 30.0  # a replica that follows the registry may not know a new version yet
_PASSING = (
    errors.Unavailable,
    errors.DeadlineExceeded,
    errors.ResourceExhausted,
    errors.Cancelled,
    errors.Unauthenticated,  # until the worker has a new delegation
)


class Answers:
    """Asks replicas in turn.

    Args:
        channels: to the replicas.
        credential: returns the delegation to use now.
        subject: `adapters/{adapter}/versions/{version}` or `models/{model}`.
        digest: of the subject; empty where the trainer does not say: then the first answer's holds for all.
        max_tokens: of an answer.
        patience_s: how long all replicas may be away.
    """

    def __init__(
        self,
        channels: Sequence[grpc.aio.Channel],
        credential: Callable[[], str],
        subject: str,
        digest: str,
        max_tokens: int,
        patience_s: float,
    ) -> None:
        stubs = [inference_service_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
        self._turns = itertools.cycle(stubs)
        self._credential = credential
        self._subject = subject
        self._digest = digest
        self._max_tokens = max_tokens
        self._patience_s = patience_s

    async def sample(self, question: Question) -> evaluation_pb2.Sample:
        """Asks one question, and returns it with its answer or why none came.

        Raises:
            Refused: another version answered, or nobody does.
        """
        sample = evaluation_pb2.Sample(
            index=question.index,
            row_digest=question.row_digest,
            picture_blobs=question.picture_blobs,
            prompt=question.prompt,
            expected=question.expected,
        )
        request = inference_service_pb2.GenerateRequest(
            model=self._subject,
            prompt=inference_pb2.Prompt(messages=question.messages),
            sampling=inference_pb2.SamplingParams(max_tokens=self._max_tokens, temperature=0.0),
        )
        try:
            response, seconds = await self._generate(request)
        except errors.VeneerError as problem:  # of this question: it has no answer
            sample.failure.CopyFrom(failure(problem.reason, problem.message, transient=False))
            return sample
        self._check(response.served_by)
        sample.answer = response.text
        sample.latency_ms = 1000 * seconds
        return sample

    async def _generate(
        self, request: inference_service_pb2.GenerateRequest
    ) -> tuple[inference_service_pb2.GenerateResponse, float]:
        began_s, again_s = time.monotonic(), _AGAIN_S
        while True:
            asked_s = time.monotonic()
            try:
                call = next(self._turns).Generate(request, timeout=_CALL_S, metadata=bearer(self._credential()))
                return await call, time.monotonic() - asked_s
            except grpc.RpcError as error:
                problem, waited_s = from_rpc_error(error), time.monotonic() - began_s
                if isinstance(problem, errors.NotFound):
                    if waited_s > _LAG_S:
                        raise Refused(problem.reason, f"no replica knows {self._subject}: {problem.message}") from error
                elif not isinstance(problem, _PASSING):
                    raise problem from error
                elif waited_s > self._patience_s:
                    text = f"no replica has answered for {self._patience_s:g} s: {problem.message}"
                    raise Refused("INFERENCE_UNAVAILABLE", text, transient=True) from error
            await asyncio.sleep(min(problem.retry_after_s or again_s, _LONGEST_AGAIN_S))
            again_s = min(2 * again_s, _LONGEST_AGAIN_S)

    def _check(self, served: inference_pb2.ServedBy) -> None:
        """Holds who answered against what was pinned."""
        is_base = self._subject.startswith("models/")
        if is_base:
            who, digest = ("" if served.adapter_version else served.model), served.model_digest
        else:
            who, digest = served.adapter_version, served.adapter_digest
        self._digest = self._digest or digest
        if who != self._subject or digest != self._digest:
            text = (
                f"{self._subject} with digest {self._digest} was asked, "
                f"{served.adapter_version or served.model} with {digest} answered at {served.replica}"
            )
            raise Refused("ANOTHER_ANSWERED", text, transient=True)
