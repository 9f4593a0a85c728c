"""What this worker is and can do, as it tells the trainer."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it has no stubs

from veneer.trainer.v1 import model_pb2, worker_service_pb2
from veneer_digests import model_digest
from veneer_rpc.names import ModelName

_CGROUP = Path("/sys/fs/cgroup")


def held_models(directories: Mapping[ModelName, Path]) -> dict[ModelName, str]:
    """Returns the digest of each base, read from its files: a second per gigabyte.

    Raises:
        DigestError, OSError: a directory is not a model's.
    """
    return {name: model_digest(directory) for name, directory in directories.items()}


def worker_info(
    worker: str, threads: int, digests: Mapping[ModelName, str], allowed_bytes: int = 0
) -> worker_service_pb2.WorkerInfo:
    """Returns what AcquireLease announces; of the memory no more than is allowed, where a bound is."""
    return worker_service_pb2.WorkerInfo(
        worker=worker,
        device="cpu",
        worker_class=f"cpu-{threads}x",
        dtypes=[model_pb2.DTYPE_FLOAT32, model_pb2.DTYPE_BFLOAT16],
        memory_bytes=min(memory_bytes(), allowed_bytes or sys.maxsize),
        models=[
            worker_service_pb2.HeldModel(model=name, digest=digest)
            for name, digest in sorted((str(model), digest) for model, digest in digests.items())
        ],
        code_version=code_version(),
    )


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
