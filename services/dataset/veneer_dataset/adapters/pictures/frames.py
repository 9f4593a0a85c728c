"""How the service and its decoding children speak: frames of a small JSON head and a body of bytes."""

from typing import IO, TypeVar

import msgspec

_SIZE_BYTES = 4
_T = TypeVar("_T", bound=msgspec.Struct)


class Job(msgspec.Struct):
    """Decode the body. With `pixels`, resize it so; else tell what it is."""

    pixels: tuple[int, int, int, int, int] | None = None  # min_pixels, max_pixels, patch, merge, temporal patch


class Outcome(msgspec.Struct):
    """What came of a job: a refusal's code, or sizes and hash, the pixels being the body."""

    width: int = 0
    height: int = 0
    perceptual_hash: int = 0
    code: str = ""
    found: str = ""


def send(stream: IO[bytes], head: msgspec.Struct, body: bytes | memoryview) -> None:
    """Writes a frame."""
    encoded = msgspec.json.encode(head)
    sizes = len(encoded).to_bytes(_SIZE_BYTES, "big") + len(body).to_bytes(_SIZE_BYTES, "big")
    stream.write(sizes + encoded)
    stream.write(body)
    stream.flush()


def receive(stream: IO[bytes], kind: type[_T]) -> tuple[_T, bytes]:
    """Reads a frame.

    Raises:
        EOFError: the other side is gone.
    """
    sizes = _exactly(stream, 2 * _SIZE_BYTES)
    head = _exactly(stream, int.from_bytes(sizes[:_SIZE_BYTES], "big"))
    body = _exactly(stream, int.from_bytes(sizes[_SIZE_BYTES:], "big"))
    return msgspec.json.decode(head, type=kind), body


def _exactly(stream: IO[bytes], size_bytes: int) -> bytes:
    data = stream.read(size_bytes)
    if len(data) < size_bytes:
        raise EOFError("the other side is gone")
    return data
