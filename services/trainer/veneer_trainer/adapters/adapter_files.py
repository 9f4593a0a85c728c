"""Folders of adapter versions: `<root>/<version uid>/`, in their place by one rename and never changed there."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from veneer_rpc.errors import NotFound
from veneer_trainer.adapters import peft_folder
from veneer_trainer.adapters.received_files import sync_folder
from veneer_trainer.domain.adapters import Inspected
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Contract
from veneer_trainer.failpoints import failpoint
from veneer_trainer.ports import BaseModel


class AdapterFiles:
    """The AdapterFolders of one folder; see `registry_ports.AdapterFolders`.

    Args:
        root: the folder; made when missing. On the file system of what is received.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def inspect(self, folder: Path, base: BaseModel, contract: Contract) -> Inspected:
        """See AdapterFolders."""
        return peft_folder.inspect(folder, base, contract)

    def take(self, folder: Path, uid: str) -> None:
        """See AdapterFolders."""
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
