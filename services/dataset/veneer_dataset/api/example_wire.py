"""Examples as ReadExamplesResponses on the wire, put together from bytes.

What a row is on the wire never changes, save its index and the form of its pictures: it is encoded once, with pictures
by digest, and read from a pack. Pictures are copied once from there. The encoding is protobuf's
(https://protobuf.dev/programming-guides/encoding); the tests compare with what protobuf writes.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from operator import add
from typing import Any

import numpy as np

from veneer.dataset.v1 import conversation_pb2
from veneer_dataset.domain.examples import Content, Piece
from veneer_dataset.domain.packed import PictureHole

MAX_PIECE_BYTES = 1024 * 1024

_Pieces = list[bytes | bytearray | memoryview]

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
_HOLE = bytes([2 << 3 | 2, 68, 2 << 3 | 2, 66, 2 << 3 | 2, 64])  # Message.parts, Part.picture, Picture.blob
_HOLE_BYTES = len(_HOLE) + 64  # a digest in hex follows


def encoded(digest: bytes, row: dict[str, Any]) -> tuple[bytes, list[PictureHole]]:
    """A row as an Example without its index, pictures by digest; and where in it the pictures are."""
    body = bytearray(_sized(2, digest.hex().encode()))
    holes: list[PictureHole] = []
    for message in row["messages"]:
        said = bytearray(_ROLES[message["role"]])
        ats: list[tuple[str, int]] = []
        for part in message["content"]:
            if part["type"] == "text":
                said += _sized(2, _sized(1, part["text"].encode()))  # Part.text
            else:
                ats.append((part["digest"], len(said)))
                said += _HOLE + part["digest"].encode()
        if "weight" in message:
            said += _UNSUPERVISED
        message_at = len(body)
        body += _head(3, len(said))
        holes += [PictureHole(picture, message_at, len(body) + at) for picture, at in ats]
        body += said
    return bytes(body), holes


def head(index: int, body: bytes) -> bytes:
    """What stands before a row's bytes in a message of several."""
    number = b"".join(_number(1, index))
    return _head(3, len(number) + len(body)) + number


def example_messages(piece: Piece) -> list[bytes]:
    """Each row in a message of its own, and after it the bytes of its pictures that do not fit into one message."""
    indexes = _indexes(piece.first, len(piece.bodies))
    if not piece.contents:
        return list(map(b"".join, zip(*_framed(1, indexes, piece.bodies), strict=True)))
    messages: list[bytes] = []
    for index, body, contents in zip(indexes, piece.bodies, piece.contents, strict=True):
        fields, chunks = _filled(body, contents)
        messages += (b"".join(_field(1, [index, *fields])), *chunks)
    return messages


def batch_messages(piece: Piece) -> list[bytes]:
    """All rows in one message; one with pictures that do not fit into it is its last, and their bytes follow."""
    indexes = _indexes(piece.first, len(piece.bodies))
    if not piece.contents:
        framed: list[bytes] = [b""] * (3 * len(indexes))
        for column, values in enumerate(_framed(3, indexes, piece.bodies)):
            framed[column::3] = values
        return [b"".join(framed)]
    messages: list[bytes] = []
    batch: _Pieces = []
    for index, body, contents in zip(indexes, piece.bodies, piece.contents, strict=True):
        fields, chunks = _filled(body, contents)
        batch += _field(3, [index, *fields])
        if chunks:
            messages += (b"".join(batch), *chunks)
            batch = []
    if batch:
        messages.append(b"".join(batch))
    return messages


def _framed(
    number: int, indexes: Sequence[bytes], bodies: Sequence[bytes]
) -> tuple[Sequence[bytes], Sequence[bytes], Sequence[bytes]]:
    """Fields that hold Examples, by columns: head, index and body. Hundreds of thousands are wanted a second."""
    sizes = map(add, map(len, indexes), map(len, bodies))
    return list(map(_head, repeat(number), sizes)), indexes, bodies


def _filled(body: bytes, contents: Sequence[tuple[PictureHole, Content]]) -> tuple[_Pieces, list[bytes]]:
    """A row's bytes with its pictures put in, and PictureChunks with what of them does not fit into one message."""
    pieces: _Pieces = []
    chunks: list[bytes] = []
    room_bytes = MAX_PIECE_BYTES
    message_at, head_at, size_bytes, done = -1, 0, 0, 0
    for number, (hole, content) in enumerate(contents):
        if hole.message_at != message_at:
            if message_at >= 0:
                pieces[head_at] = _head(3, size_bytes)
            message_at = hole.message_at
            content_at, end = _span(body, message_at)
            pieces += (body[done:message_at], b"")  # the message's head, when its pictures are known
            head_at, size_bytes, done = len(pieces) - 1, end - content_at, content_at
        data = np.ascontiguousarray(content).reshape(-1).data if isinstance(content, np.ndarray) else content
        inline = data if len(data) <= room_bytes else memoryview(data)[:room_bytes]
        room_bytes -= len(inline)
        if isinstance(content, np.ndarray):
            height, width = content.shape[:2]
            rgb = _field(4, [inline]) if inline else []
            picture = [_sized(1, hole.digest.encode()), *_number(2, width), *_number(3, height), *rgb]
            part = _field(2, _field(2, _field(3, picture)))
        else:
            part = [_file_head(len(inline)), inline]
        pieces += (body[done : hole.part_at], *part)
        size_bytes += sum(map(len, part)) - _HOLE_BYTES
        done = hole.part_at + _HOLE_BYTES
        for start in range(len(inline), len(data), MAX_PIECE_BYTES):
            chunk = [*_number(1, number), *_field(2, [memoryview(data)[start : start + MAX_PIECE_BYTES]])]
            chunks.append(b"".join(_field(2, chunk)))
    if message_at >= 0:
        pieces[head_at] = _head(3, size_bytes)
    pieces.append(body[done:])
    return pieces, chunks


@lru_cache(4096)
def _file_head(size_bytes: int) -> bytes:
    """What stands before so many bytes of a picture's file: the heads of Message.parts, Part.picture, Picture.data."""
    data = _head(1, size_bytes)
    picture = _head(2, len(data) + size_bytes) + data
    return _head(2, len(picture) + size_bytes) + picture


def _span(data: bytes, at: int) -> tuple[int, int]:
    """Where the content of the field at a place begins and ends."""
    size_bytes = shift = 0
    while True:
        at += 1
        size_bytes |= (data[at] & 0x7F) << shift
        shift += 7
        if data[at] < 0x80:
            return at + 1, at + 1 + size_bytes


def _sized(number: int, content: bytes) -> bytes:
    """As _field, of bytes that are in one and few."""
    return _head(number, len(content)) + content


def _field(number: int, pieces: Sequence[bytes | bytearray | memoryview]) -> _Pieces:
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


_INDEXES = [bytes([1 << 3, value]) if value else b"" for value in range(128)]
_LOW_BITS = [bytes([1 << 3, value | 0x80]) for value in range(128)]


def _indexes(first: int, count: int) -> list[bytes]:
    """The fields Example.index of rows one after another; nothing where it is 0."""
    fields: list[bytes] = []
    for high in range(first >> 7, (first + count + 127) >> 7):
        wanted = slice(max(0, first - (high << 7)), first + count - (high << 7))
        more = _varint(high)
        fields += [low + more for low in _LOW_BITS[wanted]] if high else _INDEXES[wanted]
    return fields
