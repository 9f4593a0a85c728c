"""Examples on the wire are what protobuf itself would write."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.dataset.v1 import conversation_pb2, dataset_service_pb2
from veneer_dataset.api import example_wire
from veneer_dataset.api.example_wire import batch_messages, encoded, example_messages, head
from veneer_dataset.domain.examples import Content, PictureForm, Piece

PIECE = 100  # bytes, in place of a MiB

_DIGESTS = st.binary(min_size=32, max_size=32)
_PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=200).map(lambda text: {"type": "text", "text": text}),
    _DIGESTS.map(lambda digest: {"type": "image", "digest": digest.hex()}),
)
_MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.lists(_PARTS, max_size=4)},
    optional={"weight": st.just(0)},
)
_PIXELS = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(
    lambda size: np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)
)
_FILES = st.integers(0, 3 * PIECE).map(lambda size: bytes(number % 251 for number in range(size)))


@pytest.fixture(autouse=True, scope="module")
def _small_pieces() -> Any:  # noqa: ANN401  # a generator of pytest's
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_wire, "MAX_PIECE_BYTES", PIECE)
        yield


@dataclass(frozen=True)
class Example:
    index: int
    digest: bytes
    messages: list[dict[str, Any]]
    contents: list[Content]


def piece_of(examples: list[Example], form: PictureForm) -> Piece:
    bodies, contents = [], []
    for example in examples:
        body, holes = encoded(example.digest, {"messages": example.messages})
        bodies.append(body)
        contents.append(list(zip(holes, example.contents, strict=form is not PictureForm.DIGEST)))
    return Piece(examples[0].index, bodies, () if form is PictureForm.DIGEST else contents)


@st.composite
def _examples(draw: st.DrawFn, form: PictureForm, index: int) -> Example:
    messages = draw(st.lists(_MESSAGES, max_size=4))
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    contents: dict[PictureForm, st.SearchStrategy[Any]] = {
        PictureForm.DIGEST: st.just([]),
        PictureForm.ORIGINAL: st.lists(_FILES, min_size=count, max_size=count),
        PictureForm.RESIZED: st.lists(_PIXELS, min_size=count, max_size=count),
    }
    return Example(index, draw(_DIGESTS), messages, draw(contents[form]))


@given(st.integers(0, 300) | st.integers(0, 1 << 40), st.integers(1, 4), st.sampled_from(PictureForm), st.data())
def test_as_protobuf_writes_it(first: int, count: int, form: PictureForm, data: st.DataObject) -> None:
    examples = [data.draw(_examples(form, first + number)) for number in range(count)]
    piece = piece_of(examples, form)
    expected = [_messages(example, form) for example in examples]
    assert example_messages(piece) == [_serialized(message) for messages in expected for message in messages]
    batches: list[dataset_service_pb2.ReadExamplesResponse] = []
    ended = True
    for row, *chunks in expected:
        if ended:
            batches.append(dataset_service_pb2.ReadExamplesResponse())
        batches[-1].examples.append(row.example)
        batches += chunks
        ended = bool(chunks)
    assert batch_messages(piece) == [_serialized(message) for message in batches]


@given(st.integers(0, 300) | st.integers(0, 1 << 40), st.binary(max_size=40_000))
def test_a_head_is_what_stands_before_a_body_in_a_batch(index: int, body: bytes) -> None:
    assert batch_messages(Piece(index, [body], ())) == [head(index, body) + body]


@pytest.mark.parametrize("form", [PictureForm.DIGEST, PictureForm.ORIGINAL])
def test_indexes_over_the_lengths_of_their_numbers(form: PictureForm) -> None:
    row = [{"role": "user", "content": [{"type": "text", "text": "t"}]}]
    for first in (0, 100, (1 << 14) - 200, (1 << 21) - 3):
        examples = [Example(first + number, bytes(32), row, []) for number in range(400)]
        (message,) = batch_messages(piece_of(examples, form))
        read = dataset_service_pb2.ReadExamplesResponse.FromString(message).examples
        assert [each.index for each in read] == [each.index for each in examples]


def _serialized(message: dataset_service_pb2.ReadExamplesResponse) -> bytes:
    return message.SerializeToString(deterministic=True)


def test_pixels_that_are_a_view_of_others() -> None:
    rgb = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)[:, ::2]
    messages = [{"role": "user", "content": [{"type": "image", "digest": "ab" * 32}]}]
    (message,) = example_messages(piece_of([Example(0, b"x" * 32, messages, [rgb])], PictureForm.RESIZED))
    resized = dataset_service_pb2.ReadExamplesResponse.FromString(message).example.messages[0].parts[0].picture.resized
    assert (resized.height, resized.width, resized.rgb) == (4, 3, rgb.tobytes())


def _messages(example: Example, form: PictureForm) -> list[dataset_service_pb2.ReadExamplesResponse]:
    first = dataset_service_pb2.ReadExamplesResponse()
    first.example.index, first.example.row_digest = example.index, example.digest.hex()
    messages = [first]
    room, number = PIECE, 0
    for message in example.messages:
        role = conversation_pb2.Role.Value(f"ROLE_{message['role'].upper()}")
        said = first.example.messages.add(role=role, unsupervised="weight" in message)
        for part in message["content"]:
            if part["type"] == "text":
                said.parts.add(text=part["text"])
                continue
            picture = said.parts.add().picture
            if form is PictureForm.DIGEST:
                picture.blob = part["digest"]
                continue
            content = example.contents[number]
            whole = content.tobytes() if isinstance(content, np.ndarray) else content
            inline = whole[:room]
            room -= len(inline)
            if isinstance(content, np.ndarray):
                picture.resized.blob, picture.resized.rgb = part["digest"], inline
                picture.resized.height, picture.resized.width = content.shape[:2]
            else:
                picture.data = inline
            for start in range(len(inline), len(whole), PIECE):
                chunk = dataset_service_pb2.PictureChunk(picture_index=number, data=whole[start : start + PIECE])
                messages.append(dataset_service_pb2.ReadExamplesResponse(picture_chunk=chunk))
            number += 1
    return messages
