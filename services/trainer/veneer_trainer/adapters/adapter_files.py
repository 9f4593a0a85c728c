"""Folders of adapter versions and exports: `<root>/<uid>/`, in their place by one rename and never changed there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from veneer_digests import DigestError, graphs_digest, model_digest
from veneer_rpc.errors import FailedPrecondition, NotFound
from veneer_trainer.adapters import peft_folder
from veneer_trainer.adapters.received_files import room_on_disk, sync_folder
from veneer_trainer.domain.adapters import Inspected
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Contract
from veneer_trainer.failpoints import failpoint
from veneer_trainer.ports import BaseModel


class VersionFiles:
    """Folders by uid.

    Args:
        root: the folder; made when missing. On the file system of what is received.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def take(self, folder: Path, uid: str) -> None:
        """See AdapterFolders and ExportFolders."""
        sync_folder(folder)
        folder.rename(self._root / uid)
        sync_folder(self._root)
        failpoint("publish.renamed")

    def read(self, uid: str, files: Collection[StoredFile]) -> OpenFolder:
        """See AdapterFolders."""
        return OpenFolder(self._root / uid, files)

    def forget(self, uid: str) -> None:
        """See AdapterFolders."""
        shutil.rmtree(self._root / uid, ignore_errors=True)

    def keep_only(self, uids: Collection[str]) -> None:
        """See AdapterFolders."""
        for folder in self._root.iterdir():
            if folder.name not in uids:
                shutil.rmtree(folder)


class AdapterFiles(VersionFiles):
    """The AdapterFolders of one folder; see `registry_ports.AdapterFolders`."""

    def inspect(self, folder: Path, base: BaseModel, contract: Contract) -> Inspected:
        """See AdapterFolders."""
        return peft_folder.inspect(folder, base, contract)


class ExportFiles(VersionFiles):
    """The ExportFolders of one folder; see `export_ports.ExportFolders`."""

    def digest(self, folder: Path, files: Collection[StoredFile]) -> str:
        """See ExportFolders."""
        if not any(file.path.endswith(".safetensors") for file in files):
            return graphs_digest({file.path: file.digest for file in files})
        try:
            return model_digest(folder)
        except (DigestError, OSError) as error:
            text = f"{Path(error.filename).name}: {error.strerror}" if isinstance(error, OSError) else str(error)
            raise FailedPrecondition("EXPORT_UNFIT", f"the export is no model: {text}") from error

    def add(self, folder: Path, path: str, data: bytes) -> StoredFile:
        """See ExportFolders."""
        with room_on_disk(path), (folder / path).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return StoredFile(path, hashlib.sha256(data).hexdigest(), len(data))


class OpenFolder:
    """Files held open, so that they can be read to their end when the version is deleted meanwhile.

    Raises:
        NotFound: VERSION_GONE: it was deleted before.
    """

    def __init__(self, folder: Path, files: Collection[StoredFile]) -> None:
        self._files: dict[str, BinaryIO] = {}
        try:
            for file in files:
                self._files[file.path] = (folder / file.path).open("rb")
        except FileNotFoundError as error:
            self.close()
            raise NotFound("VERSION_GONE", "the version has been deleted") from error

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Returns bytes of a file."""
        file = self._files[path]
        file.seek(offset)
        return file.read(size)

    def close(self) -> None:
        """Closes them all."""
        for file in self._files.values():
            file.close()
