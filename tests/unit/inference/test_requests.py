# ruff: noqa: ANN401  # generated messages take any field
"""What a request may hold: every wrong field is named, and all of them at once."""

import math
from typing import Any

import pytest

from veneer.dataset.v1.conversation_pb2 import Message, Part, Picture, ResizedPicture, Role
from veneer.inference.v1.inference_pb2 import Prompt, SamplingParams
from veneer.inference.v1.inference_service_pb2 import GenerateRequest, ScoreRequest, StreamGenerateRequest
from veneer_inference.api import requests
from veneer_rpc.errors import InvalidArgument, PermissionDenied, ResourceExhausted
from veneer_rpc.names import AdapterAliasName, AdapterName, AdapterVersionName, ModelName

CONTEXT = 4096
USER, SYSTEM, ASSISTANT = Role.ROLE_USER, Role.ROLE_SYSTEM, Role.ROLE_ASSISTANT


def text(role: Any = USER, said: str = "hello") -> Message:
    return Message(role=role, parts=[Part(text=said)])


def picture(role: Any = USER, **source: Any) -> Message:
    return Message(role=role, parts=[Part(picture=Picture(**source))])


def request(
    *messages: Message, model: str = "models/tiny", max_pixels: int = 0, key: str = "", **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(
        model=model,
        prompt=Prompt(messages=messages or [text()], max_pixels=max_pixels),
        sampling=SamplingParams(**sampling),
        routing_key=key,
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models/tiny", ModelName("tiny")),
        ("adapters/x", AdapterName("x")),
        ("adapters/x@blue", AdapterAliasName("x", "blue")),
        ("adapters/x/versions/3", AdapterVersionName("x", 3)),
    ],
)
def test_who_is_asked(model: str, name: object) -> None:
    question, _ = requests.question(request(model=model), CONTEXT)
    assert question.asked == name


def test_defaults() -> None:
    _, draw = requests.question(request(), CONTEXT)
    assert (draw.max_tokens, draw.temperature, draw.top_p, draw.top_k) == (None, 0, 1, 0)
    assert (draw.repetition_penalty, draw.seed, draw.stops, draw.logprobs) == (1, 0, (), None)
    _, draw = requests.question(request(top_logprobs=0), CONTEXT)
    assert draw.logprobs == 0


def test_a_seed_is_drawn_where_it_matters() -> None:
    seeds = {requests.question(request(temperature=1.0), CONTEXT)[1].seed for _ in range(8)}
    assert len(seeds) == 8
    assert requests.question(request(temperature=1.0, seed=5), CONTEXT)[1].seed == 5


WRONG = [
    ("model", request(model="")),
    ("model", request(model="adapters/X")),
    ("model", request(model="adapters/../x")),
    ("model", request(model="adapters/x/versions/0")),
    ("routing_key", request(key="é" * 129)),
    ("prompt.max_pixels", request(max_pixels=-1)),
    ("prompt.messages", GenerateRequest(model="models/tiny")),
    ("prompt.messages[0].role", request(text(0))),
    ("prompt.messages[0].role", request(text(ASSISTANT))),
    ("prompt.messages[1].role", request(text(), text(ASSISTANT))),
    ("prompt.messages[0].parts", request(Message(role=USER))),
    ("prompt.messages[0].parts", request(Message(role=USER, parts=[Part(text="a")] * 257))),
    ("prompt.messages[0].parts[0]", request(Message(role=USER, parts=[Part()]))),
    ("prompt.messages[0].parts[0].text", request(text(said="a" * ((1 << 20) + 1)))),
    ("prompt.messages[0].parts[0].picture", request(picture())),
    ("prompt.messages[0].parts[0].picture", request(picture(SYSTEM, blob="ab" * 32), text())),
    ("prompt.messages[0].parts[0].picture.data", request(picture(data=b""))),
    ("prompt.messages[0].parts[0].picture.data", request(picture(data=bytes((3 << 20) + 1)))),
    ("prompt.messages[0].parts[0].picture.blob", request(picture(blob="AB" * 32))),
    ("prompt.messages[0].parts[0].picture.resized", request(picture(resized=ResizedPicture(blob="ab" * 32)))),
    ("sampling.max_tokens", request(max_tokens=0)),
    ("sampling.max_tokens", request(max_tokens=-1)),
    ("sampling.max_tokens", request(max_tokens=10**9)),
    ("sampling.temperature", request(temperature=math.nan)),
    ("sampling.temperature", request(temperature=-1)),
    ("sampling.temperature", request(temperature=2.1)),
    ("sampling.top_p", request(top_p=0)),
    ("sampling.top_p", request(top_p=1.1)),
    ("sampling.top_p", request(top_p=math.nan)),
    ("sampling.top_k", request(top_k=-1)),
    ("sampling.repetition_penalty", request(repetition_penalty=0)),
    ("sampling.repetition_penalty", request(repetition_penalty=math.inf)),
    ("sampling.seed", request(seed=-1)),
    ("sampling.stop[0]", request(stop=[""])),
    ("sampling.stop[1]", request(stop=["a", "a" * 257])),
    ("sampling.top_logprobs", request(top_logprobs=21)),
    ("sampling.json_schema", request(json_schema=" " * (64 * 1024 + 1))),
]


@pytest.mark.parametrize(("field", "wrong"), WRONG)
def test_a_wrong_field_is_named(field: str, wrong: GenerateRequest) -> None:
    with pytest.raises(InvalidArgument) as caught:
        requests.question(wrong, CONTEXT)
    assert [each.field for each in caught.value.violations] == [field]


def test_all_wrong_fields_are_told_at_once() -> None:
    wrong = request(text(0), picture(blob="x"), model="digits", max_tokens=0, top_p=2, stop=[""])
    with pytest.raises(InvalidArgument) as caught:
        requests.question(wrong, CONTEXT)
    assert [each.field for each in caught.value.violations] == [
        "model",
        "prompt.messages[0].role",
        "prompt.messages[1].parts[0].picture.blob",
        "sampling.max_tokens",
        "sampling.top_p",
        "sampling.stop[0]",
    ]


@pytest.mark.parametrize(
    ("reason", "wrong"),
    [
        ("TOO_MANY_PICTURES", request(*[Message(role=USER, parts=[Part(picture=Picture(blob="ab" * 32))] * 250)] * 20)),
        ("TOO_MANY_MESSAGES", request(*[text()] * 1025)),
        ("TOO_MANY_STOP_TEXTS", request(stop=["a"] * 1000)),
    ],
)
def test_far_too_many_are_refused_before_anything_is_read(reason: str, wrong: GenerateRequest) -> None:
    with pytest.raises(ResourceExhausted) as caught:
        requests.question(wrong, CONTEXT)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "url", ["http://example.com/a.png", "HTTPS://169.254.169.254/", "file:///etc/passwd", "data:image/png;base64,AA=="]
)
def test_nothing_is_fetched_from_a_url(url: str) -> None:
    with pytest.raises(PermissionDenied) as caught:
        requests.question(request(picture(blob=url)), CONTEXT)
    assert caught.value.reason == "PICTURE_BY_URL"


def test_a_request_has_no_place_for_a_template_of_its_own() -> None:
    seen, left = set(), [GenerateRequest.DESCRIPTOR, StreamGenerateRequest.DESCRIPTOR, ScoreRequest.DESCRIPTOR]
    while left:
        message = left.pop()
        if message.full_name not in seen:
            seen.add(message.full_name)
            left += [each.message_type for each in message.fields if each.message_type is not None]
            assert not [each.name for each in message.fields if "template" in each.name or "url" in each.name]
    assert len(seen) > 5


def test_what_is_scored_ends_with_an_answer_that_counts() -> None:
    good = Prompt(messages=[text(), text(ASSISTANT)])
    assert requests.score_question(ScoreRequest(model="models/tiny", prompt=good, top_logprobs=3))[1] == 3
    silent = text(ASSISTANT)
    silent.unsupervised = True
    for messages, top, field in (
        ([text()], 0, "prompt.messages[0].role"),
        ([text(), silent], 0, "prompt.messages"),
        ([text(), text(ASSISTANT)], 21, "top_logprobs"),
    ):
        wrong = ScoreRequest(model="models/tiny", prompt=Prompt(messages=messages), top_logprobs=top)
        with pytest.raises(InvalidArgument) as caught:
            requests.score_question(wrong)
        assert field in [each.field for each in caught.value.violations]
