"""Checkpoints as folders: `<root>/<job uid>/<token>-<step>/`, the manifest last, then one rename.

A folder without that name is not a checkpoint. The manifest has every file's SHA-256; the last two good
checkpoints are kept, so that one is there when the newest does not hold.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import structlog

from veneer_trainer.adapters.received_files import (
    ReceivedFiles,
    remove_incoming,
    room_on_disk,
    sync_folder,
)
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.failpoints import failpoint
from veneer_trainer.ports import StoredCheckpoint

_log = structlog.get_logger(__name__)
_MANIFEST = ".manifest.json"  # a name that no file of a worker can have
_KEPT = 2


class _Manifest(msgspec.Struct):
    step: int
    token: int
    created_s: float
    files: tuple[StoredFile, ...]


class CheckpointFiles:
    """The CheckpointStore of one folder; see `ports.CheckpointStore`.

    Args:
        root: the folder; made when missing, and cleared of what a dead process left half done.
        max_bytes: most bytes of one checkpoint.
        clock: seconds since 1970, for people.
    """

    def __init__(self, root: Path, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._clock = clock
        root.mkdir(parents=True, exist_ok=True)
        remove_incoming(root)

    def begin(self, uid: str, token: int, step: int, files: Collection[StoredFile]) -> _Writer:
        """See CheckpointStore."""
        received = ReceivedFiles(self._root / uid, files, self._max_bytes)
        return _Writer(received, token, step, self._clock, self._prune)

    def newest(self, uid: str) -> StoredCheckpoint | None:
        """See CheckpointStore."""
        for folder in self._folders(uid):
            try:
                return _read(folder)
            except (OSError, msgspec.MsgspecError):  # no manifest that can be read: `newest_good` removes it
                continue
        return None

    def newest_good(self, uid: str) -> StoredCheckpoint | None:
        """See CheckpointStore."""
        for folder in self._folders(uid):
            try:
                checkpoint = _read(folder)
                problem = next((file.path for file in checkpoint.files if not _holds(folder, file)), None)
            except (OSError, msgspec.MsgspecError) as error:
                checkpoint, problem = None, str(error)
            if checkpoint is not None and problem is None:
                return checkpoint
            _log.error("checkpoint damaged, the one before is used", folder=folder.name, problem=problem)
            shutil.rmtree(folder)
        return None

    def forget(self, uid: str) -> None:
        """See CheckpointStore."""
        shutil.rmtree(self._root / uid, ignore_errors=True)

    def owners(self) -> list[str]:
        """See CheckpointStore."""
        return [folder.name for folder in self._root.iterdir()]

    def _folders(self, uid: str) -> list[Path]:
        """The checkpoints of a job, newest first: a later attempt's, then a later step's."""
        return sorted((self._root / uid).glob("[0-9]*-[0-9]*"), reverse=True)

    def _prune(self, uid: str) -> None:
        for folder in self._folders(uid)[_KEPT:]:
            shutil.rmtree(folder)


class _Writer:
    """A checkpoint under way; see `ports.CheckpointWriter`."""

    def __init__(
        self,
        received: ReceivedFiles,
        token: int,
        step: int,
        clock: Callable[[], float],
        prune: Callable[[str], None],
    ) -> None:
        self._received = received
        self._token = token
        self._step = step
        self._clock = clock
        self._prune = prune
        self.write = received.write
        self.abandon = received.abandon

    def finish(self, fence: Callable[[int], AbstractContextManager[Any]]) -> StoredCheckpoint:
        """See CheckpointWriter."""
        folder = self._received.check()
        manifest = _Manifest(self._step, self._token, self._clock(), self._received.files)
        failpoint("checkpoint.manifest")
        with room_on_disk("a manifest"), (folder / _MANIFEST).open("wb") as file:
            file.write(msgspec.json.encode(manifest))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
        target = folder.parent / f"{self._token:019}-{self._step:010}"
        with fence(self._step):
            if target.exists():  # the same attempt sent the same step again
                shutil.rmtree(target)
            failpoint("checkpoint.rename")
            folder.rename(target)
            sync_folder(target.parent)
        failpoint("checkpoint.stored")
        self._prune(target.parent.name)
        return _read(target)


def _read(folder: Path) -> StoredCheckpoint:
    manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=_Manifest)
    return StoredCheckpoint(folder, manifest.step, manifest.token, manifest.files, manifest.created_s)


def _holds(folder: Path, file: StoredFile) -> bool:
    with (folder / file.path).open("rb") as stored:
        return hashlib.file_digest(stored, "sha256").hexdigest() == file.digest
