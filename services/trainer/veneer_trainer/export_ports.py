"""What the exports' domain needs of the world beside queued work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from veneer_trainer.domain.files import StoredFile
from veneer_trainer.registry_ports import OpenFiles


class ExportFolders(Protocol):
    """Folders of exports, by the work's uid: whole or not at all."""

    def digest(self, folder: Path, files: Collection[StoredFile]) -> str:
        """Returns the digest of the model in a received folder; raises FailedPrecondition where it is none."""

    def add(self, folder: Path, path: str, data: bytes) -> StoredFile:
        """Writes one more file into a received folder."""

    def take(self, folder: Path, uid: str) -> None:
        """Makes a folder that export's, durably."""

    def read(self, uid: str, files: Collection[StoredFile]) -> OpenFiles:
        """Opens files of an export; raises NotFound when they are gone."""

    def forget(self, uid: str) -> None:
        """Removes an export's folder."""

    def keep_only(self, uids: Collection[str]) -> None:
        """Removes every other folder."""


class Signer(Protocol):
    """Signs certificates; see `veneer_rpc.certificate`."""

    @property
    def public_key_pem(self) -> bytes:
        """The key that checks them."""

    def sign(self, digests: Mapping[str, str], predicate: Mapping[str, Any]) -> bytes:
        """Returns the envelope over files by path, and what was found."""
