"""A PEFT folder, as it is sent to be imported."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from veneer.trainer.v1.adapter_service_pb2 import FilePiece, ImportAdapterVersionRequest, ImportHeader
from veneer_client._errors import FolderError

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_OPTIONAL_FILES = ("processing_contract.json",)
_CHUNK_BYTES = 1 << 20


def files_of(folder: Path) -> list[Path]:
    """Returns the files that make an adapter; what a training program left beside them stays here.

    Raises:
        FolderError: one that is needed is missing.
    """
    missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if not (folder / name).is_file()]
    if missing:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        hint = "; save it with safe_serialization=True" if (folder / "adapter_model.bin").exists() else ""
        raise FolderError(f"{folder} has no {' and no '.join(missing)} ({there}){hint}")
    optional = [folder / name for name in _OPTIONAL_FILES]
    return [folder / CONFIG_FILE, folder / TENSOR_FILE, *(path for path in optional if path.is_file())]


async def pieces(header: ImportHeader, files: Sequence[Path]) -> AsyncIterator[ImportAdapterVersionRequest]:
    """Yields the messages of an import: the header, then every file in pieces."""
    yield ImportAdapterVersionRequest(header=header)
    for path in files:
        size_bytes = path.stat().st_size
        for offset in range(0, max(size_bytes, 1), _CHUNK_BYTES):
            data = await asyncio.to_thread(_read, path, offset)
            yield ImportAdapterVersionRequest(file=FilePiece(path=path.name, size_bytes=size_bytes, data=data))


def _read(path: Path, offset: int) -> bytes:
    """A piece of a file. None stays open between pieces: who refuses an import leaves the rest unasked for."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_CHUNK_BYTES)
