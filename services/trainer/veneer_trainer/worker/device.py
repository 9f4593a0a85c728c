"""What training computes on: the CPU, or an accelerator that torch can use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from veneer_trainer.worker.machine import memory_bytes

# Device files of the drivers (NVIDIA's, that under Windows, AMD's): without one, torch need not be asked.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
_ASK_S = 120.0
_QUESTION = """
import json, torch
found = torch.cuda.is_available() and torch.cuda.get_device_properties(0)
print(json.dumps([found.name, found.total_memory, torch.cuda.device_count()] if found else None))
"""


class DeviceError(Exception):
    """The device that was asked for is not there; the text says what was found."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device, as the worker announces it.

    Attributes:
        kind: "cpu" or "cuda", as torch names them.
        worker_class: of workers that take the same time for the same work.
        memory_bytes: that training has on it, each rank for itself.
    """

    kind: str
    worker_class: str
    memory_bytes: int


def find(wanted: str, threads: int, ranks: int = 1) -> Device:
    """Returns the device to train on.

    Args:
        wanted: "cpu", "cuda", or "auto" for an accelerator where there is one.
        threads: that training computes with on the CPU, in each rank.
        ranks: processes that train together, each with an accelerator of its own.

    Raises:
        DeviceError: "cuda" was asked for, and torch has none; there are fewer than ranks; or a driver does not answer.
    """
    if wanted == "cuda" or (wanted == "auto" and any(Path(driver).exists() for driver in _DRIVERS)):
        # In a process of its own: this one does without torch, and children are forked from one that has no context.
        try:
            answer = subprocess.run(  # noqa: S603  # our own program
                [sys.executable, "-c", _QUESTION], capture_output=True, text=True, timeout=_ASK_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            text = f"device: torch has not said in {_ASK_S:g} s what this machine has; cpu does without its driver"
            raise DeviceError(text) from error
        found = json.loads(answer.stdout) if answer.returncode == 0 else None
        if found is not None:
            name, total_bytes, count = found
            if ranks > count:
                raise DeviceError(f"ranks: each takes a GPU of its own; {ranks} were asked for, torch finds {count}")
            kind = "cuda-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            return Device("cuda", kind + _several(ranks), total_bytes)
        if wanted == "cuda":
            raise DeviceError(f"device: torch finds no CUDA device here; {answer.stderr.strip() or 'it says no more'}")
    return Device("cpu", f"cpu-{threads}x{_several(ranks)}", memory_bytes() // ranks)


def _several(ranks: int) -> str:
    return f"-{ranks}-ranks" if ranks > 1 else ""
