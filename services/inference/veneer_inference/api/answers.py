"""From a checked question to its answer, step by step: who is pinned, what is read, what the engine draws."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from veneer_inference.admission import Admission
from veneer_inference.api.engine_errors import engine_errors
from veneer_inference.api.prompts import Prompts, ReadPrompt
from veneer_inference.base import Base, closed_in_the_end
from veneer_inference.domain.answer_text import AnswerText
from veneer_inference.domain.figures import FiguresByVersion
from veneer_inference.domain.question import Draw, Question
from veneer_inference.domain.registry import Release
from veneer_inference.metrics import Metrics, Outcome
from veneer_inference.ports import EngineError, Sampling, Step, TokenScore
from veneer_inference.residency import Holding, Residency
from veneer_processing import ContractMismatchError, PixelBounds, Processor, TokenCounts
from veneer_rpc.calls import Call
from veneer_rpc.errors import Internal, NotFound, Unavailable, VeneerError, Violation, invalid
from veneer_rpc.names import ModelName

DEFAULT_MAX_TOKENS = 512
_ATTEMPTS = 3  # at a version that the engine drops between its load and its use


@dataclass(frozen=True, slots=True, eq=False)
class Pinned:
    """Who answers, from the first token to the last; `release` and `holding` are None for the base alone."""

    base: Base
    processor: Processor
    release: Release | None = None
    holding: Holding | None = None

    @property
    def adapter_digest(self) -> str:
        """Of the adapter; empty for the base alone."""
        return self.release.digest if self.release else ""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What one step of the engine brought.

    Attributes:
        text: the next characters.
        token_ids: the tokens.
        scores: of those tokens, when they were asked for.
        finish: "" while the answer goes on, else "stop" or "length".
        answer_tokens: so far.
        cached_tokens: of the prompt, from the prefix cache.
        queued_s: from arrival to admission.
        first_token_s: from arrival to the first token.
        total_s: from arrival to now.
    """

    text: str
    token_ids: tuple[int, ...]
    scores: tuple[TokenScore, ...]
    finish: str
    answer_tokens: int
    cached_tokens: int
    queued_s: float
    first_token_s: float
    total_s: float


_NOTHING = Piece("", (), (), "", 0, 0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """An answer under way."""

    pinned: Pinned
    counts: TokenCounts
    pieces: AsyncIterator[Piece]


class Answers:
    """Answers, scores and counts.

    Args:
        base: the living base; raises Unavailable where there is none.
        admission: finds the version that is asked.
        residency: brings it into the engine.
        prompts: reads what is asked.
        figures: count how it went, for the registry.
        metrics: count how it went, for whoever watches this replica.
    """

    def __init__(
        self,
        base: Callable[[], Base],
        admission: Admission,
        residency: Residency,
        prompts: Prompts,
        figures: FiguresByVersion,
        metrics: Metrics,
    ) -> None:
        self._base = base
        self._admission = admission
        self._residency = residency
        self._prompts = prompts
        self._figures = figures
        self._metrics = metrics

    @property
    def base(self) -> Base:
        """The living base; raises Unavailable where there is none."""
        return self._base()

    @property
    def context_length(self) -> int:
        """The longest sequence of the base; raises as `base`."""
        return self._base().engine.info.context_length

    async def pin(self, tenant: str, question: Question) -> Pinned:
        """Decides who answers, and has it in the engine.

        Raises:
            NotFound: there is no such base, adapter, alias or version.
            InvalidArgument: a pixel bound that cannot be had.
            FailedPrecondition: the version cannot be served.
            Unavailable: the engine, or the trainer that is needed for this, is away.
        """
        base, asked = self._base(), question.asked
        if isinstance(asked, ModelName):
            return Pinned(base, _bounded(base, asked, question.prompt.max_pixels))
        release = await self._admission.pin(tenant, asked, question.routing_key)
        with engine_errors():
            holding = await self._residency.ready(release)
        holding.use(release)
        own, wanted = holding.processor.contract.max_pixels, question.prompt.max_pixels
        if wanted not in (0, own):
            raise invalid(
                Violation("prompt.max_pixels", "ADAPTER_DECIDES", f"{release.version} brings its own bound, {own}")
            )
        return Pinned(holding.base, holding.processor, release, holding)

    async def answer(self, call: Call, question: Question, draw: Draw, authorization: str) -> Answer:
        """Begins an answer; nothing reaches the engine before its first piece is asked for. Errors as the parts'."""
        pinned = await self.pin(call.tenant, question)
        most_tokens = pinned.base.most_tokens
        read = await self._prompts.read(question.prompt, pinned.processor, authorization, most_tokens - 1)
        sampling = _sampling(draw, read.counts.total, most_tokens, pinned.base.stop_ids)
        return Answer(pinned, read.counts, self._pieces(call, pinned, read, sampling, draw))

    async def score(
        self, call: Call, question: Question, top_logprobs: int, authorization: str
    ) -> tuple[Pinned, ReadPrompt, tuple[TokenScore, ...]]:
        """Scores a conversation's answers: a score for each supervised token, in order."""
        pinned = await self.pin(call.tenant, question)
        most_tokens = pinned.base.most_tokens
        read = await self._prompts.read(question.prompt, pinned.processor, authorization, most_tokens, to_score=True)
        with engine_errors():
            for attempt in range(_ATTEMPTS):
                try:
                    engine = pinned.base.engine
                    scores = await engine.score(call.tenant, pinned.adapter_digest, read.prompt, top_logprobs)
                    break
                except EngineError as error:
                    pinned = await self._again(pinned, error, attempt)
        return pinned, read, scores

    async def count(self, call: Call, question: Question, authorization: str) -> TokenCounts:
        """Counts the tokens of a conversation."""
        pinned = await self.pin(call.tenant, question)
        return await self._prompts.count(question.prompt, pinned.processor, authorization)

    async def _pieces(
        self, call: Call, pinned: Pinned, read: ReadPrompt, sampling: Sampling, draw: Draw
    ) -> AsyncIterator[Piece]:
        release = pinned.release
        outcome: Outcome = "cancelled"
        piece = _NOTHING
        try:
            async with closed_in_the_end(
                _texts(call, self._steps(call, pinned, read, sampling), pinned, draw)
            ) as pieces:
                async for piece in pieces:
                    yield piece
            outcome = "answered"
            if release:
                self._figures.answered(release, time.monotonic() - call.started_s)
        except (Unavailable, Internal):
            outcome = "failed"
            if release:
                self._figures.failed(release)
            raise
        except VeneerError:
            outcome = "refused"
            raise
        finally:
            self._metrics.ended(
                call.tenant, release, outcome,
                prompt_tokens=read.counts.total, cached_tokens=piece.cached_tokens,
                answer_tokens=piece.answer_tokens, queued_s=piece.queued_s,
                first_token_s=piece.first_token_s, total_s=piece.total_s,
            )  # fmt: skip

    async def _steps(
        self, call: Call, pinned: Pinned, read: ReadPrompt, sampling: Sampling
    ) -> AsyncIterator[tuple[float, Step]]:
        """The engine's steps, each with the time at which the engine got the request."""
        for attempt in range(_ATTEMPTS):
            asked_s = time.monotonic()
            steps = pinned.base.engine.generate(call.tenant, pinned.adapter_digest, read.prompt, sampling)
            with engine_errors():
                try:
                    async with closed_in_the_end(steps):
                        async for step in steps:
                            yield asked_s, step
                        return
                except EngineError as error:  # about a version that is not loaded: before the first step alone
                    pinned = await self._again(pinned, error, attempt)

    async def _again(self, pinned: Pinned, error: EngineError, attempt: int) -> Pinned:
        """Loads the version again that the engine has dropped since it was pinned; raises any other error."""
        holding, release = pinned.holding, pinned.release
        if error.reason != "ADAPTER_NOT_LOADED" or holding is None or release is None or attempt + 1 == _ATTEMPTS:
            raise error
        self._residency.lost(holding)
        holding = await self._residency.ready(release)
        return replace(pinned, base=holding.base, holding=holding)


async def _texts(
    call: Call, steps: AsyncIterator[tuple[float, Step]], pinned: Pinned, draw: Draw
) -> AsyncIterator[Piece]:
    """Turns steps into pieces; ends at a stop text, and closes the engine's answer then."""
    text, stop_ids = AnswerText(pinned.base.token_bytes, draw.stops), pinned.base.stop_ids
    answer_tokens, first_token_s = 0, 0.0
    async with closed_in_the_end(steps):
        async for asked_s, step in steps:
            characters, taken = "", 0
            for token_id in step.token_ids:
                taken += 1
                if token_id not in stop_ids:
                    characters += text.push(token_id)
                if text.stopped:
                    break
            finish = "stop" if text.stopped else step.finish
            if finish and not text.stopped:
                characters += text.rest()
                finish = "stop" if text.stopped else finish
            answer_tokens += taken
            total_s = time.monotonic() - call.started_s
            if taken and not first_token_s:
                first_token_s = total_s
            queued_s = asked_s - call.started_s + step.queued_s
            yield Piece(
                characters, step.token_ids[:taken], step.scores[:taken], finish, answer_tokens,
                step.cached_tokens, queued_s, first_token_s, total_s,
            )  # fmt: skip
            if finish:
                return
    raise Internal("ANSWER_UNFINISHED", "the engine's answer has no end")


def _bounded(base: Base, asked: ModelName, max_pixels: int) -> Processor:
    """The base's processor, under the bound that a request names."""
    if asked != base.name:
        raise NotFound("MODEL_UNKNOWN", f"there is no {asked} here; there is: {base.name}", resource=str(asked))
    if not max_pixels:
        return base.processor
    contract = base.processor.contract
    bounds = PixelBounds(min(contract.min_pixels, max_pixels), max_pixels)
    try:
        return base.processor.under(replace(contract, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels))
    except ContractMismatchError as error:
        raise invalid(Violation("prompt.max_pixels", "OUT_OF_RANGE", "; ".join(error.differences))) from error


def _sampling(draw: Draw, prompt_tokens: int, most_tokens: int, stop_ids: tuple[int, ...]) -> Sampling:
    """How the engine is to draw; an answer of the default length gives way to the context, a longer one is refused."""
    room = most_tokens - prompt_tokens
    max_tokens = draw.max_tokens or min(DEFAULT_MAX_TOKENS, room)
    if max_tokens > room:
        raise invalid(
            Violation(
                "sampling.max_tokens", "TOO_LONG",
                f"must be at most {room} after a prompt of {prompt_tokens} tokens, was {max_tokens}; "
                f"prompt and answer have {most_tokens}",
            )
        )  # fmt: skip
    return Sampling(
        max_tokens, draw.temperature, draw.top_p, draw.top_k, draw.repetition_penalty, draw.seed, draw.logprobs,
        stop_ids, draw.json_schema,
    )  # fmt: skip
