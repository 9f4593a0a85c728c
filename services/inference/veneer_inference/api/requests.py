"""From the contract's requests to the domain's values; every wrong field of a request is told at once."""

import math
import re
import secrets
from collections.abc import Sequence
from typing import Protocol, cast

from veneer.dataset.v1 import conversation_pb2
from veneer.inference.v1 import inference_pb2
from veneer_inference.domain.question import Asked, Draw, MessageDraft, PictureRef, PromptDraft, Question
from veneer_inference.domain.registry import AdapterRef
from veneer_processing import Role
from veneer_rpc.errors import PermissionDenied, ResourceExhausted, Violations, violations
from veneer_rpc.names import AdapterAliasName, AdapterName, AdapterVersionName, ModelName, ResourceName, parse_one_of

MAX_MESSAGES = 1024
MAX_PICTURES = 64
MAX_PARTS = 256
MAX_TEXT_BYTES = 1 << 20
MAX_PICTURE_BYTES = 3 << 20
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_BYTES = 64 << 10
MAX_ROUTING_KEY_BYTES = 256
MAX_TEMPERATURE = 2.0

_DIGEST = re.compile(r"[0-9a-f]{64}")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_ROLES: dict[int, Role] = {
    conversation_pb2.ROLE_SYSTEM: "system",
    conversation_pb2.ROLE_USER: "user",
    conversation_pb2.ROLE_ASSISTANT: "assistant",
}
_ADAPTER_KINDS: tuple[type[ResourceName], ...] = (AdapterName, AdapterVersionName, AdapterAliasName)


class _Asking(Protocol):
    """A request with who is asked and what."""

    @property
    def model(self) -> str: ...
    @property
    def prompt(self) -> inference_pb2.Prompt: ...


def question(request: _Asking, context_length: int) -> tuple[Question, Draw]:
    """Checks a GenerateRequest or StreamGenerateRequest.

    Raises:
        InvalidArgument: with every wrong field.
        PermissionDenied: a picture by URL.
        ResourceExhausted: more pictures, messages or stop texts than are taken at all.
    """
    with violations() as found:
        asked = _question(request, found)
        draw = _draw(request.sampling, context_length, found)  # type: ignore[attr-defined]  # both have it
        _check_last(request.prompt, "user", found)
    return asked, draw


def score_question(request: _Asking) -> tuple[Question, int]:
    """Checks a ScoreRequest; returns the likeliest tokens that are wanted beside each, too. Errors as `question`."""
    with violations() as found:
        asked = _question(request, found)
        top_logprobs: int = request.top_logprobs  # type: ignore[attr-defined]  # it is a ScoreRequest
        _check_range("top_logprobs", top_logprobs, 0, MAX_TOP_LOGPROBS, found)
        _check_last(request.prompt, "assistant", found)
        if not any(each.role == conversation_pb2.ROLE_ASSISTANT and not each.unsupervised
                   for each in request.prompt.messages):  # fmt: skip
            found.add("prompt.messages", "NOTHING_TO_SCORE", "must hold an assistant's message that is supervised")
    return asked, top_logprobs


def count_question(request: _Asking) -> Question:
    """Checks a CountTokensRequest; errors as `question`."""
    with violations() as found:
        asked = _question(request, found)
    return asked


def adapter_name(text: str, field: str) -> AdapterRef:
    """Reads the name of an adapter, with or without alias or version."""
    return cast(AdapterRef, parse_one_of(text, field, *_ADAPTER_KINDS))


def _question(request: _Asking, found: Violations) -> Question:
    asked = found.attempt(_asked, request.model)
    routing_key: str = getattr(request, "routing_key", "")
    if len(routing_key.encode()) > MAX_ROUTING_KEY_BYTES:
        found.add("routing_key", "TOO_LONG", f"must be at most {MAX_ROUTING_KEY_BYTES} bytes")
    prompt = _prompt(request.prompt, found)
    return Question(asked or ModelName("none"), prompt, routing_key)  # the violation is raised before it is used


def _asked(text: str) -> Asked:
    return cast(Asked, parse_one_of(text, "model", ModelName, *_ADAPTER_KINDS))


def _prompt(prompt: inference_pb2.Prompt, found: Violations) -> PromptDraft:
    pictures = sum(part.HasField("picture") for message in prompt.messages for part in message.parts)
    _refuse_more("TOO_MANY_MESSAGES", len(prompt.messages), MAX_MESSAGES)
    _refuse_more("TOO_MANY_PICTURES", pictures, MAX_PICTURES)
    if not prompt.messages:
        found.add("prompt.messages", "MISSING", "must hold a message")
    if prompt.max_pixels < 0:
        found.add("prompt.max_pixels", "OUT_OF_RANGE", f"must be 0 or more, was {prompt.max_pixels}")
    messages = [_message(each, f"prompt.messages[{index}]", found) for index, each in enumerate(prompt.messages)]
    return PromptDraft(tuple(messages), prompt.max_pixels)


def _message(message: conversation_pb2.Message, place: str, found: Violations) -> MessageDraft:
    role = _ROLES.get(message.role)
    if role is None:
        found.add(f"{place}.role", "UNKNOWN", f"must be system, user or assistant, was {message.role}")
    if not 1 <= len(message.parts) <= MAX_PARTS:
        found.add(f"{place}.parts", "OUT_OF_RANGE", f"must be 1 to {MAX_PARTS}, there are {len(message.parts)}")
    parts: list[str | PictureRef] = []
    for index, part in enumerate(message.parts):
        at = f"{place}.parts[{index}]"
        match part.WhichOneof("content"):
            case "text":
                if (size := len(part.text.encode())) > MAX_TEXT_BYTES:
                    found.add(f"{at}.text", "TOO_LONG", f"must be at most {MAX_TEXT_BYTES} bytes, has {size}")
                parts.append(part.text)
            case "picture":
                if role not in (None, "user"):
                    found.add(f"{at}.picture", "NOT_ALLOWED", f"only a user's message holds pictures, this is {role}'s")
                parts.append(_picture(part.picture, f"{at}.picture", found))
            case _:
                found.add(at, "MISSING", "must hold text or a picture")
    return MessageDraft(role or "user", tuple(parts), not message.unsupervised)


def _picture(picture: conversation_pb2.Picture, place: str, found: Violations) -> PictureRef:
    match picture.WhichOneof("source"):
        case "data":
            if not 1 <= (size := len(picture.data)) <= MAX_PICTURE_BYTES:
                found.add(
                    f"{place}.data", "OUT_OF_RANGE",
                    f"must be 1 to {MAX_PICTURE_BYTES} bytes, has {size}; a larger one goes as a blob",
                )  # fmt: skip
            return PictureRef(f"{place}.data", data=picture.data)
        case "blob":
            if _URL.match(picture.blob):
                raise PermissionDenied("PICTURE_BY_URL", f"{place}.blob: nothing is fetched from a URL: send the bytes")
            if not _DIGEST.fullmatch(picture.blob):
                found.add(
                    f"{place}.blob", "INVALID_DIGEST", f"must be 64 lower-case hex digits, was {picture.blob[:80]!r}"
                )
            return PictureRef(f"{place}.blob", blob=picture.blob)
        case "resized":
            found.add(f"{place}.resized", "NOT_ALLOWED", "must be an encoded file or a blob")
        case _:
            found.add(place, "MISSING", "must hold data or a blob's digest")
    return PictureRef(place)


def _check_last(prompt: inference_pb2.Prompt, role: Role, found: Violations) -> None:
    if not prompt.messages:
        return
    last = _ROLES.get(prompt.messages[-1].role)
    if last is not None and last != role:
        place = f"prompt.messages[{len(prompt.messages) - 1}].role"
        found.add(place, "WRONG_ROLE", f"the last message must be of role {role}, is of {last}")


def _draw(params: inference_pb2.SamplingParams, context_length: int, found: Violations) -> Draw:
    _refuse_more("TOO_MANY_STOP_TEXTS", len(params.stop), MAX_STOPS)
    max_tokens = params.max_tokens if params.HasField("max_tokens") else None
    temperature = params.temperature if params.HasField("temperature") else 0.0
    top_p = params.top_p if params.HasField("top_p") else 1.0
    penalty = params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
    logprobs = params.top_logprobs if params.HasField("top_logprobs") else None
    seed = params.seed if params.HasField("seed") else (secrets.randbits(63) if temperature > 0 else 0)
    if max_tokens is not None:
        _check_range("sampling.max_tokens", max_tokens, 1, context_length, found)
    _check_range("sampling.temperature", temperature, 0, MAX_TEMPERATURE, found)
    if not 0 < top_p <= 1:  # also not a number
        found.add("sampling.top_p", "OUT_OF_RANGE", f"must be greater than 0 and at most 1, was {top_p}")
    _check_range("sampling.top_k", params.top_k, 0, math.inf, found)
    _check_range("sampling.repetition_penalty", penalty, 0.1, 10, found)
    _check_range("sampling.seed", seed, 0, math.inf, found)
    _check_range("sampling.top_logprobs", logprobs or 0, 0, MAX_TOP_LOGPROBS, found)
    _check_stops(params.stop, found)
    if (size := len(params.json_schema.encode())) > MAX_SCHEMA_BYTES:
        found.add("sampling.json_schema", "TOO_LONG", f"must be at most {MAX_SCHEMA_BYTES} bytes, has {size}")
    return Draw(
        max_tokens, temperature, top_p, params.top_k, penalty, seed, tuple(params.stop), logprobs, params.json_schema
    )


def _check_stops(stops: Sequence[str], found: Violations) -> None:
    for index, stop in enumerate(stops):
        if not 1 <= (size := len(stop.encode())) <= MAX_STOP_BYTES:
            found.add(f"sampling.stop[{index}]", "OUT_OF_RANGE", f"must be 1 to {MAX_STOP_BYTES} bytes, has {size}")


def _check_range(field: str, value: float, least: float, most: float, found: Violations) -> None:
    if not least <= value <= most:  # also not a number
        limits = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:.15g}"
        found.add(field, "OUT_OF_RANGE", f"must be {limits}, was {value}")


def _refuse_more(reason: str, count: int, most: int) -> None:
    if count > most:
        what = reason.removeprefix("TOO_MANY_").lower().replace("_", " ")
        raise ResourceExhausted(reason, f"at most {most} {what} in a request, there are {count}")
