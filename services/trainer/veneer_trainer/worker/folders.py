"""Folders on their way between a worker's disk and the trainer's streams."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from veneer.trainer.v1 import adapter_service_pb2, model_pb2

PIECE_BYTES = 1 << 20


def described(folder: Path) -> list[model_pb2.ModelFile]:
    """Returns every file of a folder with digest and size, sorted by path."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        files.append(model_pb2.ModelFile(path=name, digest=digest, size_bytes=path.stat().st_size))
    return files


def pieces(folder: Path, files: list[model_pb2.ModelFile]) -> Iterator[adapter_service_pb2.FilePiece]:
    """Yields the bytes of a folder's files, at most 1 MiB at a time."""
    for described_file in files:
        with (folder / described_file.path).open("rb") as file:
            data = file.read(PIECE_BYTES)
            while True:
                yield adapter_service_pb2.FilePiece(
                    path=described_file.path, size_bytes=described_file.size_bytes, data=data
                )
                data = file.read(PIECE_BYTES)
                if not data:
                    break


def append(folder: Path, path: str, data: bytes) -> None:
    """Appends received bytes to a file of a folder.

    Raises:
        ValueError: the path leads out of the folder.
    """
    target = folder / path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path[:80]!r} leads out of its folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab") as file:
        file.write(data)


def check(folder: Path, announced: list[model_pb2.ModelFile]) -> None:
    """Holds a received folder against what was announced.

    Raises:
        ValueError: a file is missing or damaged.
    """
    found = {file.path: file.digest for file in described(folder)}
    for file in announced:
        if found.get(file.path) != file.digest:
            raise ValueError(f"{file.path} is not what was announced: SHA-256 {found.get(file.path, 'of nothing')}")
