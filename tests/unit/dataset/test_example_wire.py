"""Examples on the wire are what protobuf itself would write."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.dataset.v1 import conversation_pb2, dataset_service_pb2
from veneer_dataset.api import example_wire
from veneer_dataset.api.example_wire import batch_messages, example_messages
from veneer_dataset.domain.examples import Example, PictureForm

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


@given(st.integers(0, 1 << 40), _DIGESTS, st.lists(_MESSAGES, max_size=4), st.sampled_from(PictureForm), st.data())
def test_as_protobuf_writes_it(
    index: int, digest: bytes, messages: list[dict[str, Any]], form: PictureForm, data: st.DataObject
) -> None:
    count = sum(part["type"] == "image" for message in messages for part in message["content"])
    contents: dict[PictureForm, st.SearchStrategy[Any]] = {
        PictureForm.DIGEST: st.just(()),
        PictureForm.ORIGINAL: st.lists(_FILES, min_size=count, max_size=count),
        PictureForm.RESIZED: st.lists(_PIXELS, min_size=count, max_size=count),
    }
    example = Example(index, digest, {"messages": messages}, data.draw(contents[form]))
    expected = _messages(example, form)
    assert list(example_messages([example], form)) == [_serialized(message) for message in expected]
    batch = dataset_service_pb2.ReadExamplesResponse(examples=[expected[0].example])
    assert list(batch_messages([example], form)) == [_serialized(message) for message in (batch, *expected[1:])]


@given(st.lists(st.integers(0, PIECE // 2).map(bytes) | _FILES, max_size=12))
def test_batches_hold_all_rows_in_order_and_end_where_chunks_follow(files: list[bytes]) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "image", "digest": "ab" * 32}]}]}
    examples = [Example(index, b"x" * 32, row, [file]) for index, file in enumerate(files)]
    seen: list[bytes] = []
    for message in map(
        dataset_service_pb2.ReadExamplesResponse.FromString, batch_messages(examples, PictureForm.ORIGINAL)
    ):
        if message.HasField("picture_chunk"):
            seen[-1] += message.picture_chunk.data
            continue
        *others, _ = message.examples
        assert dataset_service_pb2.ReadExamplesResponse(examples=others).ByteSize() < PIECE
        for example in message.examples:
            assert example.index == len(seen)
            seen.append(example.messages[0].parts[0].picture.data)
        assert all(seen[each.index] == files[each.index] for each in others)
    assert seen == files


def _serialized(message: dataset_service_pb2.ReadExamplesResponse) -> bytes:
    return message.SerializeToString(deterministic=True)


def test_pixels_that_are_a_view_of_others() -> None:
    rgb = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)[:, ::2]
    row = {"messages": [{"role": "user", "content": [{"type": "image", "digest": "ab" * 32}]}]}
    (message,) = example_messages([Example(0, b"x" * 32, row, [rgb])], PictureForm.RESIZED)
    resized = dataset_service_pb2.ReadExamplesResponse.FromString(message).example.messages[0].parts[0].picture.resized
    assert (resized.height, resized.width, resized.rgb) == (4, 3, rgb.tobytes())


def _messages(example: Example, form: PictureForm) -> list[dataset_service_pb2.ReadExamplesResponse]:
    first = dataset_service_pb2.ReadExamplesResponse()
    first.example.index, first.example.row_digest = example.index, example.row_digest.hex()
    messages = [first]
    room, number = PIECE, 0
    for message in example.row["messages"]:
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
            content = example.pictures[number]
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
