"""What the service's process and the engine's say to each other, and how it lies on the socket.

A frame is its length (4 bytes, big-endian) and a msgspec MessagePack of one command or one report. Arrays are raw
bytes. The engine answers with one report a step.
"""

from __future__ import annotations

import socket

import msgspec
import numpy as np

from veneer_inference.engine.options import EngineOptions
from veneer_inference.ports import AdapterState, EngineInfo, EnginePrompt, EngineStats, Sampling, Step, TokenScore

MAX_FRAME_BYTES = 1 << 30  # a prompt with its pixels; what is longer is a mistake
LENGTH_BYTES = 4
_ENCODER = msgspec.msgpack.Encoder()


class Prompt(msgspec.Struct, array_like=True):
    """`EnginePrompt` with its arrays as bytes."""

    ids: bytes
    positions: bytes
    rope_delta: int
    grids: bytes
    patches: memoryview
    patch_values: int
    picture_digests: tuple[str, ...]
    supervised: bytes

    @classmethod
    def of(cls, prompt: EnginePrompt) -> Prompt:
        """Packs a prompt."""
        supervised = b"" if prompt.supervised_T is None else prompt.supervised_T.astype(np.bool_).tobytes()
        return cls(
            prompt.ids_T.astype(np.int64).tobytes(),
            prompt.positions_3_T.astype(np.int64).tobytes(),
            prompt.rope_delta,
            prompt.grids_n_3.astype(np.int64).tobytes(),
            np.ascontiguousarray(prompt.patches_N_P, np.float32).reshape(-1).view(np.uint8).data,
            prompt.patches_N_P.shape[1] if prompt.patches_N_P.ndim == 2 else 0,
            prompt.picture_digests,
            supervised,
        )

    def unpacked(self) -> EnginePrompt:
        """The prompt again; its arrays are views of the frame."""
        return EnginePrompt(
            np.frombuffer(self.ids, np.int64),
            np.frombuffer(self.positions, np.int64).reshape(3, -1),
            self.rope_delta,
            np.frombuffer(self.grids, np.int64).reshape(-1, 3),
            np.frombuffer(self.patches, np.float32).reshape(-1, max(self.patch_values, 1)),
            self.picture_digests,
            np.frombuffer(self.supervised, np.bool_) if self.supervised else None,
        )


class Generate(msgspec.Struct, array_like=True, tag=1):
    """Answer a prompt."""

    key: int
    tenant: str
    adapter: str
    prompt: Prompt
    sampling: Sampling


class Score(msgspec.Struct, array_like=True, tag=2):
    """Score the supervised tokens of a prompt."""

    key: int
    tenant: str
    adapter: str
    prompt: Prompt
    top_logprobs: int


class Cancel(msgspec.Struct, array_like=True, tag=3):
    """Forget a request."""

    key: int


class Load(msgspec.Struct, array_like=True, tag=4):
    """Load an adapter."""

    key: int
    digest: str
    directory: str


class Unload(msgspec.Struct, array_like=True, tag=5):
    """Drop an adapter once it is unused."""

    key: int
    digest: str


Command = Generate | Score | Cancel | Load | Unload


class Start(msgspec.Struct, array_like=True):
    """The first message to an engine."""

    options: EngineOptions


class Ready(msgspec.Struct, array_like=True, tag=1):
    """The engine has its base and takes commands."""

    info: EngineInfo


class NotStarted(msgspec.Struct, array_like=True, tag=2):
    """The engine cannot start, and ends."""

    problems: list[str]


class Progress(msgspec.Struct, array_like=True):
    """A step of one answer."""

    key: int
    step: Step


class Done(msgspec.Struct, array_like=True):
    """What was asked has been done: scores, or bytes of an adapter."""

    key: int
    scores: tuple[TokenScore, ...] = ()
    size_bytes: int = 0


class Failure(msgspec.Struct, array_like=True):
    """What was asked cannot be done: the parts of an `EngineError`."""

    key: int
    reason: str
    problems: tuple[str, ...]
    retry_s: float | None = None


class Report(msgspec.Struct, array_like=True, tag=3):
    """Everything that one step brought.

    Attributes:
        progress: of answers.
        done: of everything else.
        failures: of anything.
        stats: the figures after the step; without adapters.
        adapters: all of them, where one has changed; else None.
    """

    progress: list[Progress]
    done: list[Done]
    failures: list[Failure]
    stats: EngineStats
    adapters: tuple[AdapterState, ...] | None


Message = Ready | NotStarted | Report
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def frame(message: Start | Command | Message) -> bytearray:
    """A message as it goes over the socket.

    Raises:
        ValueError: it is longer than a frame may be.
    """
    data = bytearray()
    _ENCODER.encode_into(message, data, LENGTH_BYTES)
    size = len(data) - LENGTH_BYTES
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {size} bytes; at most {MAX_FRAME_BYTES} can be sent")
    data[:LENGTH_BYTES] = size.to_bytes(LENGTH_BYTES, "big")
    return data


def receive(connection: socket.socket) -> Command | None:
    """The next command from a blocking socket; None at its end.

    Raises:
        ValueError: no frame, or no command.
    """
    body = _body(connection)
    return None if body is None else msgspec.msgpack.decode(body, type=Command)


def receive_start(connection: socket.socket) -> EngineOptions | None:
    """The first message to an engine; None when the service has gone already."""
    body = _body(connection)
    return None if body is None else msgspec.msgpack.decode(body, type=Start).options


def parse(body: bytes) -> Message:
    """A message of an engine, without its length."""
    return _DECODER.decode(body)


def _body(connection: socket.socket) -> bytearray | None:
    length = _exactly(connection, LENGTH_BYTES)
    if length is None:
        return None
    size = int.from_bytes(length, "big")
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {size} bytes; at most {MAX_FRAME_BYTES} are taken")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if got == 0:
            return None
        view = view[got:]
    return data
