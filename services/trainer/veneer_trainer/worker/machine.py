"""What this machine has: bases, memory, and this version of the code."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it has no stubs

from veneer_digests import model_digest
from veneer_rpc.names import ModelName

_CGROUP = Path("/sys/fs/cgroup")


def held_models(directories: Mapping[ModelName, Path]) -> dict[ModelName, str]:
    """Returns the digest of each base, read from its files: a second per gigabyte.

    Raises:
        DigestError, OSError: a directory is not a model's.
    """
    return {name: model_digest(directory) for name, directory in directories.items()}


def code_version() -> str:
    """Returns the version of Veneer's code that runs here."""
    return importlib.metadata.version("veneer")


def memory_bytes() -> int:
    """Returns the memory that this process may use: the machine's, or its control group's where that is less."""
    return min(int(psutil.virtual_memory().total), _limit_bytes())


def available_memory_bytes() -> int:
    """Returns the memory that is free for this process, within the bound of its control group."""
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, _limit_bytes() - int((_CGROUP / "memory.current").read_text("ascii")))
    except OSError:  # no control group
        return free


def _limit_bytes() -> int:
    try:
        limit = (_CGROUP / "memory.max").read_text("ascii").strip()
    except OSError:  # not Linux, or the older control groups
        return sys.maxsize
    return sys.maxsize if limit == "max" else int(limit)
