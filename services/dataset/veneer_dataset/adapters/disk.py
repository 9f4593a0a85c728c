"""Durable files, and a full disk told as what it is."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer_rpc.errors import ResourceExhausted


@contextmanager
def full_disk() -> Iterator[None]:
    """Raises ResourceExhausted where the block fails for want of space."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceExhausted("DISK_FULL", "no space is left on the server", retry_after_s=60) from error


def move_durably(source: Path, target: Path) -> None:
    """Moves a file within a file system; bytes and name survive a power cut when this returns."""
    with full_disk():
        _sync(source, 0)
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync(target.parent.parent, os.O_DIRECTORY)
        source.replace(target)
        _sync(target.parent, os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
