"""Adapters on this replica's disk: a PEFT folder a digest, there whole or not at all."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import structlog

from veneer_digests import DigestError, adapter_digest, parse_json, tensor_digests
from veneer_processing import ProcessingContract, ProcessingError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CONTRACT_FILE = "processing_contract.json"

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_log = structlog.get_logger(__name__)


class FolderError(Exception):
    """A folder that is no adapter, or not the one it is said to be; the text says why, without a path."""


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter on disk, and the contract that is sealed in it."""

    digest: str
    directory: Path
    contract: ProcessingContract
    size_bytes: int


class AdapterFolders:
    """The folders; all methods block, so the service calls them in threads.

    Args:
        root: where they are; made where it is missing, cleared of what an earlier process left unfinished.
        most_bytes: of all of them; `trim` deletes those longest unused beyond it.
    """

    def __init__(self, root: Path, most_bytes: int) -> None:
        self._root = root
        self._most_bytes = most_bytes
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".new-*"):
            shutil.rmtree(left, ignore_errors=True)

    def find(self, digest: str) -> AdapterFolder | None:
        """The adapter, if it is here; notes its use. Whether its bytes are still right, the engine checks."""
        directory = self._root / digest
        if not _DIGEST.fullmatch(digest) or not directory.is_dir():
            return None
        try:
            os.utime(directory)
            return AdapterFolder(digest, directory, _contract(directory), _size_bytes(directory))
        except (OSError, FolderError) as error:
            _log.warning("adapter on disk is damaged", digest=digest, problem=str(error))
            self.delete(digest)
            return None

    def incoming(self, most_bytes: int) -> "Incoming":
        """A place for a download of at most so many bytes."""
        return Incoming(Path(tempfile.mkdtemp(prefix=".new-", dir=self._root)), most_bytes)

    def keep(self, incoming: "Incoming", expected_digest: str) -> AdapterFolder:
        """Takes a complete download in, under the digest of what came.

        Args:
            incoming: closed.
            expected_digest: what it must be; empty where that is not known.

        Raises:
            FolderError: it is no adapter, or another one.
        """
        directory = incoming.directory
        contract = _contract(directory)
        digest = _digest(directory, contract)
        if expected_digest and digest != expected_digest:
            raise FolderError(f"its bytes have digest {digest}, the registry says {expected_digest}")
        target = self._root / digest
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not target.exists():
            directory.rename(target)
        return AdapterFolder(digest, target, contract, _size_bytes(target))

    def delete(self, digest: str) -> None:
        """Deletes an adapter; one that is not here is no error."""
        directory = self._root / digest
        if directory.exists():
            doomed = Path(tempfile.mkdtemp(prefix=".new-", dir=self._root))
            directory.rename(doomed / digest)  # so that nobody finds half of it
            shutil.rmtree(doomed)

    def trim(self, in_use: Collection[str]) -> None:
        """Deletes those longest unused until the rest fits; what is in use stays."""
        folders = [each for each in self._root.iterdir() if _DIGEST.fullmatch(each.name)]
        folders.sort(key=lambda each: each.stat().st_mtime)
        left_bytes = sum(map(_size_bytes, folders))
        for folder in folders:
            if left_bytes <= self._most_bytes:
                return
            if folder.name not in in_use:
                left_bytes -= _size_bytes(folder)
                self.delete(folder.name)
                _log.info("adapter deleted from disk", digest=folder.name)


class Incoming:
    """A folder that is being filled. `close` it in any case; what was not kept goes."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self.directory = directory
        self._left_bytes = most_bytes
        self._most_bytes = most_bytes

    def write(self, path: str, offset_bytes: int, data: bytes) -> None:
        """Appends to a file.

        Raises:
            FolderError: a name with more than letters, digits, `.`, `_` and `-`; a gap; too many bytes.
        """
        if not _FILE_NAME.fullmatch(path):
            raise FolderError(f"it has a file named {path[:80]!r}")
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise FolderError(f"it has more than {self._most_bytes} bytes, the limit here")
        with (self.directory / path).open("ab") as file:
            if file.tell() != offset_bytes:
                raise FolderError(f"{path}: byte {offset_bytes} came where {file.tell()} was due")
            file.write(data)

    def sync(self) -> None:
        """Puts all files on the disk."""
        for path in self.directory.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Deletes what was not kept."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _size_bytes(directory: Path) -> int:
    return sum(each.stat().st_size for each in directory.iterdir())


def _contract(directory: Path) -> ProcessingContract:
    try:
        values = json.loads((directory / CONTRACT_FILE).read_bytes())
        return ProcessingContract.from_dict(values)
    except FileNotFoundError:
        raise FolderError(f"it has no {CONTRACT_FILE}") from None
    except (ValueError, AttributeError, ProcessingError) as error:
        raise FolderError(f"{CONTRACT_FILE}: {error}"[:400]) from error


def _digest(directory: Path, contract: ProcessingContract) -> str:
    try:
        config = parse_json((directory / CONFIG_FILE).read_bytes())
        if not isinstance(config, dict):
            raise FolderError(f"{CONFIG_FILE} is no JSON object")
        return adapter_digest(tensor_digests(directory / TENSOR_FILE), config, contract.digest)
    except FileNotFoundError as error:
        raise FolderError(f"it has no {Path(error.filename).name}") from None
    except DigestError as error:
        raise FolderError(str(error)[:400]) from error
