"""Files that a service streams, onto this machine's disk: a broken download goes on where it was."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from veneer.trainer.v1.model_pb2 import ModelFile
from veneer_client._calls import FOLLOW_ATTEMPTS, STREAM_TIMEOUT_S, Patience
from veneer_client._errors import DataLoss, StatusError


class Piece(Protocol):
    """A message of a download."""

    path: str
    offset_bytes: int
    data: bytes


Stream = Callable[[Sequence[str], int, float], AsyncIterator[Piece]]
"""Given paths, an offset in the first and a timeout in seconds: one attempt at a download."""

Tell = Callable[[int], None]
"""Is told how many bytes more have come."""


async def download(files: Collection[ModelFile], target: Path, stream: Stream, tell: Tell = lambda size: None) -> None:
    """Writes files into a folder, and holds each against its digest.

    Args:
        files: what there is; files of the same names are replaced.
        target: created where it does not exist.
        stream: makes an attempt.
        tell: hears of progress.

    Raises:
        DataLoss: a file is not what was announced, or would lie outside of the folder.
    """
    paths = [file.path for file in files]
    for path in paths:
        _inside(target, path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(b"")
    await _fetch(paths, target, stream, tell)
    for file in files:
        await asyncio.to_thread(_check, target / file.path, file.digest)


async def _fetch(paths: list[str], target: Path, stream: Stream, tell: Tell) -> None:
    patience = Patience(STREAM_TIMEOUT_S, FOLLOW_ATTEMPTS)
    offset_bytes = 0
    while True:
        try:
            async for piece in stream(paths, offset_bytes, patience.left_s()):
                del paths[: paths.index(piece.path)]
                await asyncio.to_thread(_append, target / piece.path, piece.data)
                offset_bytes = piece.offset_bytes + len(piece.data)
                tell(len(piece.data))
                patience.progressed()
            return
        except StatusError as error:
            await patience.wait(error)


def _inside(folder: Path, path: str) -> Path:
    """Refuses a path that leads out of the folder."""
    whole = folder / path
    if not whole.resolve().is_relative_to(folder.resolve()):
        raise DataLoss("PATH_OUTSIDE", f"the service named a file {path!r} outside of its folder")
    return whole


def _check(path: Path, digest: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise DataLoss("DIGEST_MISMATCH", f"{path} has sha256 {found}, not {digest}: download it again")


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
