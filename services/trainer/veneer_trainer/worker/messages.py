"""What parent and child say to one another, and how it is framed on their socket.

A frame is its length in 4 bytes, big-endian, then JSON. Contract messages travel inside as their own bytes; files stay
on disk, in the attempt's folder, and only their folder's name travels.
"""

from __future__ import annotations

import socket
from asyncio import IncompleteReadError, StreamReader
from typing import TypeAlias

import msgspec

MAX_FRAME_BYTES = 64 << 20


class Task(msgspec.Struct, tag=True, frozen=True):
    """To the child, first and perhaps again: a job, and where everything is. Its folder names it on the socket.

    Attributes:
        job: a serialised TrainingJob.
        model_directory: of the base.
        model_digest: of the base.
        dataset: address of the dataset service.
        certificates_file: PEM of whom to trust there; empty for none.
        delegation: credential for it.
        folder: the attempt's own, for checkpoints and the adapter.
        checkpoint_folder: a checkpoint to resume from; empty for none.
        initial_folder: PEFT folder of the adapter version to start from; empty for none, and beside a checkpoint.
        device: that computes, "cpu" or "cuda".
        threads: that it computes with.
        tenant: whose the job is.
        cache_bytes: most memory for rows, and again for features of pictures.
        feature_folder: where features of pictures are kept from job to job.
        feature_disk_bytes: most disk for them.
        dataset_patience_s: how long a dataset service may be away.
    """

    job: bytes
    model_directory: str
    model_digest: str
    dataset: str
    certificates_file: str
    delegation: str
    folder: str
    checkpoint_folder: str
    initial_folder: str
    device: str
    threads: int
    tenant: str
    cache_bytes: int
    feature_folder: str
    feature_disk_bytes: int
    dataset_patience_s: float


class Measure(msgspec.Struct, tag=True, frozen=True):
    """First to a child that is to measure: a shape of job, on which base.

    Attributes:
        spec: a serialised TrainingSpec; its dtype and LoRA count.
        model_directory: of the base.
        model_digest: of the base.
        device: that computes, "cpu" or "cuda".
        threads: that it computes with.
        cache_bytes: most memory for rows, and again for features of pictures.
    """

    spec: bytes
    model_directory: str
    model_digest: str
    device: str
    threads: int
    cache_bytes: int


class ExportTask(msgspec.Struct, tag=True, frozen=True):
    """First to the child: the export, and where everything is.

    Attributes:
        export: a serialised Export.
        model_directory: of the base.
        model_digest: of the base.
        dataset: address of the dataset service.
        certificates_file: PEM of whom to trust there; empty for none.
        delegation: credential for it.
        folder: the attempt's own.
        adapter_folder: the version's PEFT folder, with its contract.
        threads: that it computes with.
        prompts: that the exported model is checked on.
        dataset_patience_s: how long a dataset service may be away.
    """

    export: bytes
    model_directory: str
    model_digest: str
    dataset: str
    certificates_file: str
    delegation: str
    folder: str
    adapter_folder: str
    threads: int
    prompts: int
    dataset_patience_s: float


class Stop(msgspec.Struct, tag=True, frozen=True):
    """To the child: make a checkpoint of the job after the step, and stop it."""

    folder: str


class Leave(msgspec.Struct, tag=True, frozen=True):
    """To the child: drop the job after the step; nobody listens to it any more."""

    folder: str


class Delegation(msgspec.Struct, tag=True, frozen=True):
    """To the child: a renewed credential."""

    delegation: str


class Resolved(msgspec.Struct, tag=True, frozen=True):
    """From the child, before the first step: a serialised ResolvedTraining."""

    resolved: bytes


class Progressed(msgspec.Struct, tag=True, frozen=True):
    """From the child: a serialised TrainingProgress."""

    progress: bytes


class CheckpointMade(msgspec.Struct, tag=True, frozen=True):
    """From the child: a folder with a checkpoint; the parent stores and removes it."""

    step: int
    folder: str


class Shared(msgspec.Struct, tag=True, frozen=True):
    """From the child: names of jobs that have shared passes with this one, itself included."""

    jobs: list[str]


class Stopped(msgspec.Struct, tag=True, frozen=True):
    """From the child, last: it obeyed."""


class Trained(msgspec.Struct, tag=True, frozen=True):
    """From the child, last: the adapter's PEFT folder, its digest, and the final TrainingProgress, serialised."""

    folder: str
    digest: str
    progress: bytes


class Measured(msgspec.Struct, tag=True, frozen=True):
    """From the child, last: a serialised Calibration."""

    calibration: bytes


class ShareDone(msgspec.Struct, tag=True, frozen=True):
    """From the child that exports: how much is done, 0-1."""

    share: float


class Exported(msgspec.Struct, tag=True, frozen=True):
    """From the child, last: the export's folder, its digest, and what was measured, as a JSON object."""

    folder: str
    digest: str
    measured: bytes


class Failed(msgspec.Struct, tag=True, frozen=True):
    """From the child, last: why it cannot go on."""

    reason: str
    message: str
    transient: bool


OfJob: TypeAlias = Resolved | Progressed | CheckpointMade | Shared | Stopped | Trained | Failed


class Told(msgspec.Struct, tag=True, frozen=True):
    """From a child that trains: a message of the job with this folder."""

    folder: str
    message: OfJob


ToChild: TypeAlias = Task | Measure | ExportTask | Stop | Leave | Delegation
ToParent: TypeAlias = Told | Measured | ShareDone | Exported | Failed

_encode = msgspec.json.Encoder().encode
_to_child = msgspec.json.Decoder(ToChild)
_to_parent = msgspec.json.Decoder(ToParent)


def frame(message: ToChild | ToParent) -> bytes:
    """Returns the bytes of a message on the socket."""
    body = _encode(message)
    return len(body).to_bytes(4) + body


async def read_from_child(reader: StreamReader) -> ToParent | None:
    """Returns the child's next message; None when it has ended, however that came about.

    Raises:
        ValueError: the frame is none of ours.
    """
    try:
        size = int.from_bytes(await reader.readexactly(4))
        if size > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {size} bytes, at most {MAX_FRAME_BYTES} are sent")
        message: ToParent = _to_parent.decode(await reader.readexactly(size))
        return message
    except (IncompleteReadError, ConnectionError):
        return None


def read_from_parent(connection: socket.socket) -> ToChild | None:
    """Returns the parent's next message; None when it has ended."""
    head = _exactly(connection, 4)
    body = None if head is None else _exactly(connection, int.from_bytes(head))
    return None if body is None else _to_child.decode(body)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    pieces = bytearray()
    while len(pieces) < size:
        try:
            piece = connection.recv(min(size - len(pieces), 1 << 20))
        except ConnectionError:
            return None
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)
