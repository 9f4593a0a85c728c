"""From a checked request to what the engine reads: pictures fetched, decoded, resized, and all of it tokenised.

The work is done by a few threads of its own, but for a short text, which takes less than to wake one; each picture is
resized as soon as it is decoded, and patches are made only once the whole prompt is known to fit.
"""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from veneer_inference.adapters.blobs import Blobs
from veneer_inference.base import engine_prompt
from veneer_inference.domain.question import PromptDraft
from veneer_inference.ports import EnginePrompt
from veneer_processing import (
    Conversation,
    ConversationError,
    Message,
    Picture,
    PictureError,
    PictureTooLargeError,
    Processor,
    TemplateError,
    Text,
    TokenCounts,
    open_picture,
)
from veneer_rpc.errors import InvalidArgument, ResourceExhausted, Violation, invalid

_T = TypeVar("_T")
_PLACE = re.compile(r"(messages\[\d+\](?:\.parts\[\d+\])?): (.*)")
_RETRY_S = 1.0
_SHORT = 512  # characters: the tokens of so many take a third of a millisecond


@dataclass(frozen=True, slots=True, eq=False)
class ReadPrompt:
    """A prompt as the engine takes it, and its counts."""

    prompt: EnginePrompt
    counts: TokenCounts


class Prompts:
    """Reads prompts.

    Args:
        blobs: pictures that are named by digest.
        threads: that decode, resize and tokenise.
        most_waiting: prompts in work or waiting; more are refused.
    """

    def __init__(self, blobs: Blobs, threads: int, most_waiting: int) -> None:
        self._blobs = blobs
        self._pool = ThreadPoolExecutor(threads, "prompt")
        self._most_waiting = most_waiting
        self._waiting = 0

    def close(self) -> None:
        """Ends the threads; what they are at is finished."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def read(
        self, draft: PromptDraft, processor: Processor, authorization: str, most_tokens: int, *, to_score: bool = False
    ) -> ReadPrompt:
        """A prompt to answer, or to score.

        Args:
            draft: the request's.
            processor: of the contract that applies.
            authorization: the caller's own, for the dataset service.
            most_tokens: that may stand before an answer.
            to_score: whether it holds its answers.

        Raises:
            InvalidArgument: pictures or texts that are refused, all of them named, or too many tokens.
            ResourceExhausted: a picture over a limit on resources, or too many prompts at once.
            NotFound, FailedPrecondition, Unavailable, DataLoss: as `Blobs.read`.
        """
        with self._slot():
            pictures = await self._pictures(draft, processor, authorization)
            return await self._worked(draft, lambda: _read(draft, pictures, processor, most_tokens, to_score))

    async def count(self, draft: PromptDraft, processor: Processor, authorization: str) -> TokenCounts:
        """The tokens of a conversation; errors as `read`."""
        with self._slot():
            pictures = await self._pictures(draft, processor, authorization)
            return await self._worked(draft, lambda: _count(draft, pictures, processor))

    async def _pictures(self, draft: PromptDraft, processor: Processor, authorization: str) -> dict[str, Picture]:
        """Each picture by its place, resized; one after another, so that a call holds one whole picture at a time."""
        pictures: dict[str, Picture] = {}
        found: list[Violation] = []
        for part in (part for message in draft.messages for part in message.parts):
            if isinstance(part, str):
                continue
            data = part.data or await self._blobs.read(part.blob, authorization, part.place)
            try:
                pictures[part.place] = await self._in_thread(partial(_resized, data, processor))
            except PictureTooLargeError as error:
                raise ResourceExhausted("PICTURE_TOO_LARGE", f"{part.place}: {error}") from error
            except PictureError as error:
                found.append(Violation(part.place, "INVALID_PICTURE", str(error)))
        if found:
            raise invalid(*found)
        return pictures

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._waiting >= self._most_waiting:
            raise ResourceExhausted(
                "TOO_MANY_PROMPTS",
                f"{self._most_waiting} prompts are being read, which is this replica's limit",
                retry_after_s=_RETRY_S,
            )
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def _worked(self, draft: PromptDraft, work: Callable[[], _T]) -> _T:
        return work() if _is_short(draft) else await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        working = asyncio.wrap_future(self._pool.submit(work))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:  # a thread cannot be stopped: its work counts until it is done
            self._waiting += 1
            working.add_done_callback(self._done)
            raise

    def _done(self, working: "asyncio.Future[_T]") -> None:
        self._waiting -= 1
        if not working.cancelled():
            working.exception()  # seen, for nobody waits any more


def _is_short(draft: PromptDraft) -> bool:
    parts = [part for message in draft.messages for part in message.parts]
    texts = [part for part in parts if isinstance(part, str)]
    return len(texts) == len(parts) and sum(map(len, texts)) <= _SHORT


def _count(draft: PromptDraft, pictures: Mapping[str, Picture], processor: Processor) -> TokenCounts:
    conversation = _conversation(draft, pictures)
    with _told("prompt"):
        return processor.count([conversation])[0]


def _read(
    draft: PromptDraft, pictures: Mapping[str, Picture], processor: Processor, most_tokens: int, to_score: bool
) -> ReadPrompt:
    conversation = _conversation(draft, pictures)
    with _told("prompt"):
        encode = processor.encode if to_score else processor.encode_prompt
        encoded = encode(conversation, with_patches=False)
        counts = processor.counts(encoded)
        if counts.total > most_tokens:
            raise too_long(counts.total, most_tokens)
        encoded = processor.with_patches(encoded, conversation)
    digests = tuple(picture.sha256 for picture in conversation.pictures)
    return ReadPrompt(engine_prompt(encoded, digests, to_score=to_score), counts)


def too_long(tokens: int, most_tokens: int) -> InvalidArgument:
    """The error for a prompt that leaves no room."""
    return invalid(Violation("prompt", "TOO_LONG", f"must be at most {most_tokens} tokens, has {tokens}"))


def _conversation(draft: PromptDraft, pictures: Mapping[str, Picture]) -> Conversation:
    messages = []
    for index, message in enumerate(draft.messages):
        with _told(f"prompt.messages[{index}]"):
            parts = tuple(Text(part) if isinstance(part, str) else pictures[part.place] for part in message.parts)
            messages.append(Message(message.role, parts, message.supervised))
    with _told("prompt.messages"):
        return Conversation(tuple(messages))


def _resized(data: bytes, processor: Processor) -> Picture:
    picture = open_picture(data)
    return Picture.resized(picture.sha256, processor.pixels.resize(picture))


@contextmanager
def _told(field: str) -> Iterator[None]:
    """Turns what is wrong with a conversation into violations, each at its place; `field` where none is named."""
    try:
        yield
    except (ConversationError, PictureError, TemplateError) as error:
        placed = [_PLACE.fullmatch(each) for each in str(error).split("; ")]
        if all(placed):
            found = [Violation(f"prompt.{each[1]}", "INVALID_CONVERSATION", each[2]) for each in placed if each]
            raise invalid(*found) from error
        raise invalid(Violation(field, "INVALID_CONVERSATION", str(error))) from error
