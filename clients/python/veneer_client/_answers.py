"""Asking: answers at once or as they come, scores, and token counts."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from veneer.dataset.v1.conversation_pb2 import Message
from veneer.inference.v1.inference_pb2 import LoadedAdapter, Prompt, ResidentModel, SamplingParams
from veneer.inference.v1.inference_service_pb2 import (
    CountTokensRequest,
    CountTokensResponse,
    GenerateRequest,
    GenerateResponse,
    GetModelRequest,
    ListLoadedAdaptersRequest,
    ScoreRequest,
    ScoreResponse,
    StreamGenerateRequest,
    StreamGenerateResponse,
)
from veneer.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from veneer_client._calls import Connection, Patience
from veneer_client._conversation import Image, Question, conversation, message, pictures_of
from veneer_client._datasets import AsyncDatasets
from veneer_client._errors import ResourceExhausted, StatusError, Unavailable
from veneer_client._models import AsyncModels
from veneer_client._names import adapter_to_ask
from veneer_client._replicas import Replicas

ANSWER_TIMEOUT_S = 300.0
INLINE_PICTURE_BYTES = 3 * 1024 * 1024  # the contract's limit; larger ones go as blobs
INLINE_TOTAL_BYTES = INLINE_PICTURE_BYTES + 512 * 1024  # leaves room for text below a message's 4 MiB

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class _Asked:
    """Who is asked what, and the key that says which replica."""

    model: str
    prompt: Prompt
    key: bytes


class Answers:
    """The inference service, over all its replicas.

    A request goes to another replica, or is made again, only while nothing of its answer has come.
    """

    def __init__(self, replicas: Replicas, datasets: AsyncDatasets, models: AsyncModels, token: str) -> None:
        self._replicas = replicas
        self._datasets = datasets
        self._models = models
        self._token_hash = hashlib.sha256(token.encode()).digest()

    async def generate(
        self,
        question: Question,
        *,
        image: Image | None = None,
        images: Sequence[Image] = (),
        adapter: str | None = None,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        sampling: SamplingParams | None = None,
        max_pixels: int = 0,
        routing_key: str = "",
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> GenerateResponse:
        """Answers in one piece; `.text` is the answer, `.served_by` who gave it.

        Args:
            question: a text, or messages made with `message`.
            image: a picture to go before the text: a path, or a file's bytes.
            images: several.
            adapter: `digits` (its production version), `digits@3`, `digits@canary`. Default: the base alone.
            model: the base, where no adapter is named. Default: the only one there is.
            max_tokens: of the answer.
            temperature: 0, the default, takes the likeliest token each time.
            seed: of the draws.
            sampling: everything else that the contract offers; the arguments above win over it.
            max_pixels: bound on a picture's area, for the base alone.
            routing_key: always falls on the same side of a traffic split.
            timeout_s: all attempts together.
        """
        asked = await self._asked(question, image, images, adapter, model, max_pixels)
        request = GenerateRequest(
            model=asked.model,
            prompt=asked.prompt,
            sampling=_sampling(sampling, max_tokens, temperature, seed),
            routing_key=routing_key,
        )

        async def attempt(replica: Connection, left_s: float) -> GenerateResponse:
            return await replica.once(replica.stub(InferenceServiceStub).Generate, request, left_s)

        return await self._ask(asked.key, attempt, timeout_s)

    async def stream(
        self,
        question: Question,
        *,
        image: Image | None = None,
        images: Sequence[Image] = (),
        adapter: str | None = None,
        model: str | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        sampling: SamplingParams | None = None,
        max_pixels: int = 0,
        routing_key: str = "",
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> AsyncIterator[StreamGenerateResponse]:
        """Yields the pieces of an answer as they come; their `.text` joined is the answer. See `generate`.

        Raises:
            Unavailable: the replica was lost after the first piece; an answer is never begun twice.
        """
        asked = await self._asked(question, image, images, adapter, model, max_pixels)
        request = StreamGenerateRequest(
            model=asked.model,
            prompt=asked.prompt,
            sampling=_sampling(sampling, max_tokens, temperature, seed),
            routing_key=routing_key,
        )
        patience = Patience(timeout_s)
        candidates: list[Connection] = []
        while True:
            candidates = candidates or await self._order(asked.key)
            replica, begun = candidates.pop(0), False
            try:
                with self._replicas.asking(replica):
                    method = replica.stub(InferenceServiceStub).StreamGenerate
                    async for piece in replica.stream(method, request, patience.left_s()):
                        begun = True
                        yield piece
                    return
            except StatusError as error:
                if begun:
                    raise
                await self._next(error, replica, candidates, patience)

    async def score(
        self,
        question: Question,
        answer: str | None = None,
        *,
        image: Image | None = None,
        images: Sequence[Image] = (),
        adapter: str | None = None,
        model: str | None = None,
        top_logprobs: int = 0,
        max_pixels: int = 0,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> ScoreResponse:
        """Gives the log-probability of an answer's tokens; `.total_logprob` is their sum in nats.

        Args:
            question: as in `generate`; a conversation may hold its answers.
            answer: is added as the assistant's message.
            image: as in `generate`.
            images: as in `generate`.
            adapter: as in `generate`.
            model: as in `generate`.
            top_logprobs: so many likeliest tokens at each place, too.
            max_pixels: as in `generate`.
            timeout_s: all attempts together.
        """
        asked = await self._asked(question, image, images, adapter, model, max_pixels)
        if answer is not None:
            asked.prompt.messages.append(message("assistant", answer))
        request = ScoreRequest(model=asked.model, prompt=asked.prompt, top_logprobs=top_logprobs)

        async def attempt(replica: Connection, left_s: float) -> ScoreResponse:
            return await replica.once(replica.stub(InferenceServiceStub).Score, request, left_s)

        return await self._ask(asked.key, attempt, timeout_s)

    async def count_tokens(
        self,
        question: Question,
        *,
        image: Image | None = None,
        images: Sequence[Image] = (),
        adapter: str | None = None,
        model: str | None = None,
        max_pixels: int = 0,
    ) -> CountTokensResponse:
        """Counts the tokens of a question without answering it. Arguments: `generate`."""
        asked = await self._asked(question, image, images, adapter, model, max_pixels)
        request = CountTokensRequest(model=asked.model, prompt=asked.prompt)

        async def attempt(replica: Connection, left_s: float) -> CountTokensResponse:
            return await replica.once(replica.stub(InferenceServiceStub).CountTokens, request, left_s)

        return await self._ask(asked.key, attempt, ANSWER_TIMEOUT_S)

    async def resident_models(self) -> list[ResidentModel]:
        """Returns what each replica holds, one entry a replica."""
        return [
            await replica.read(replica.stub(InferenceServiceStub).GetModel, GetModelRequest())
            for replica in await self._order(b"")
        ]

    async def loaded_adapters(self) -> AsyncIterator[LoadedAdapter]:
        """Yields the adapter versions that replicas hold, replica by replica."""
        for replica in await self._order(b""):
            method = replica.stub(InferenceServiceStub).ListLoadedAdapters
            async for item in replica.pages(method, ListLoadedAdaptersRequest(), lambda page: page.loaded_adapters):
                yield item

    async def _order(self, key: bytes) -> list[Connection]:
        await self._replicas.look_up()
        return self._replicas.order(key)

    async def _ask(self, key: bytes, attempt: Callable[[Connection, float], Awaitable[_R]], timeout_s: float) -> _R:
        patience = Patience(timeout_s)
        candidates: list[Connection] = []
        while True:
            candidates = candidates or await self._order(key)
            replica = candidates.pop(0)
            try:
                with self._replicas.asking(replica):
                    return await attempt(replica, patience.left_s())
            except StatusError as error:
                await self._next(error, replica, candidates, patience)

    async def _next(
        self, error: StatusError, replica: Connection, candidates: list[Connection], patience: Patience
    ) -> None:
        """Returns at once where another replica is left to ask, else when trying again makes sense."""
        if isinstance(error, Unavailable):
            self._replicas.failed(replica)
        full_or_away = isinstance(error, Unavailable | ResourceExhausted)
        if not (full_or_away and candidates and patience.left_s()):
            await patience.wait(error)

    async def _asked(
        self,
        question: Question,
        image: Image | None,
        images: Sequence[Image],
        adapter: str | None,
        model: str | None,
        max_pixels: int,
    ) -> _Asked:
        every = [*([image] if image is not None else []), *images]
        messages = conversation(question, every)
        who = adapter_to_ask(adapter) if adapter else await self._models.name_or_only(model)
        key = b""
        pictures = pictures_of(messages)
        if pictures:
            first = pictures[0]
            seen = first.blob.encode() if first.HasField("blob") else hashlib.sha256(first.data).hexdigest().encode()
            key = b"\0".join((self._token_hash, who.encode(), seen))
        await self._send_large(messages)
        return _Asked(who, Prompt(messages=messages, max_pixels=max_pixels), key)

    async def _send_large(self, messages: Sequence[Message]) -> None:
        """Uploads the pictures that a message has no room for, and names them by digest."""
        total_bytes = 0
        for picture in pictures_of(messages):
            total_bytes += len(picture.data)
            if len(picture.data) > INLINE_PICTURE_BYTES or total_bytes > INLINE_TOTAL_BYTES:
                total_bytes -= len(picture.data)
                picture.blob = await self._datasets.upload_bytes(picture.data)


def _sampling(
    given: SamplingParams | None, max_tokens: int | None, temperature: float | None, seed: int | None
) -> SamplingParams:
    sampling = SamplingParams()
    if given is not None:
        sampling.CopyFrom(given)
    for field, value in {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}.items():
        if value is not None:
            setattr(sampling, field, value)
    return sampling
