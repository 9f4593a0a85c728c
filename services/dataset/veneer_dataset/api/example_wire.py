"""Examples as ReadExamplesResponses on the wire, put together from bytes.

protobuf's own objects copy a picture twice, into the message and out of it; here it is copied once. The encoding is
protobuf's (https://protobuf.dev/programming-guides/encoding); the tests compare with what protobuf writes.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from veneer.dataset.v1 import conversation_pb2
from veneer_dataset.domain.examples import Example, PictureForm

MAX_PIECE_BYTES = 1024 * 1024

_Pieces = list[bytes | memoryview]

_LENGTH_DELIMITED = 2
_ROLES = {
    name: bytes([1 << 3, role])  # Message.role
    for name, role in (
        ("system", conversation_pb2.ROLE_SYSTEM),
        ("user", conversation_pb2.ROLE_USER),
        ("assistant", conversation_pb2.ROLE_ASSISTANT),
    )
}
_UNSUPERVISED = bytes([3 << 3, 1])  # Message.unsupervised


def example_messages(examples: Iterable[Example], form: PictureForm) -> Iterator[bytes]:
    """Each row in a message of its own, and after it the bytes of its pictures that do not fit into one message."""
    for example in examples:
        fields, chunks = _example(example, form)
        yield b"".join(_field(1, fields))
        yield from chunks


def batch_messages(examples: Iterable[Example], form: PictureForm) -> Iterator[bytes]:
    """As many rows a message as reach MAX_PIECE_BYTES; where chunks follow, they are of its last row."""
    batch: _Pieces = []
    size_bytes = 0
    for example in examples:
        fields, chunks = _example(example, form)
        row = _field(3, fields)
        batch += row
        size_bytes += sum(map(len, row))
        if chunks or size_bytes >= MAX_PIECE_BYTES:
            yield b"".join(batch)
            yield from chunks
            batch, size_bytes = [], 0
    if batch:
        yield b"".join(batch)


def _example(example: Example, form: PictureForm) -> tuple[_Pieces, list[bytes]]:
    """A row's fields, and PictureChunks with the bytes of its pictures that do not fit into one message."""
    fields: _Pieces = [*_number(1, example.index), *_field(2, [example.row_digest.hex().encode()])]
    chunks: list[bytes] = []
    pictures = iter(example.pictures)
    room_bytes, number = MAX_PIECE_BYTES, 0
    for message in example.row["messages"]:
        said: _Pieces = [_ROLES[message["role"]]]
        for part in message["content"]:
            if part["type"] == "text":
                said += _field(2, _field(1, [part["text"].encode()]))  # Part.text
                continue
            digest = part["digest"].encode()
            if form is PictureForm.DIGEST:
                said += _field(2, _field(2, _field(2, [digest])))  # Part.picture, Picture.blob
                continue
            content = next(pictures)
            flat = np.ascontiguousarray(content).reshape(-1).data if isinstance(content, np.ndarray) else content
            data = memoryview(flat)
            inline = data[:room_bytes]
            room_bytes -= len(inline)
            picture = _field(1, [inline])  # Picture.data
            if isinstance(content, np.ndarray):
                height, width = content.shape[:2]
                rgb = _field(4, [inline]) if inline else []
                picture = _field(3, [*_field(1, [digest]), *_number(2, width), *_number(3, height), *rgb])
            said += _field(2, _field(2, picture))
            for start in range(len(inline), len(data), MAX_PIECE_BYTES):
                chunk = [*_number(1, number), *_field(2, [data[start : start + MAX_PIECE_BYTES]])]
                chunks.append(b"".join(_field(2, chunk)))
            number += 1
        if "weight" in message:
            said.append(_UNSUPERVISED)
        fields += _field(3, said)
    return fields, chunks


def _field(number: int, pieces: Sequence[bytes | memoryview]) -> _Pieces:
    """A field of bytes, of text or of a message."""
    return [_head(number, sum(map(len, pieces))), *pieces]


@lru_cache(4096)
def _head(number: int, size_bytes: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size_bytes)


def _number(number: int, value: int) -> _Pieces:
    """A field of an unsigned number; nothing where it is 0, as proto3 has it."""
    return [_varint(number << 3) + _varint(value)] if value else []


def _varint(value: int) -> bytes:
    """Seven bits a byte, the least first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
