"""Figures of a run for people: rates, time left, memory."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections import deque
from pathlib import Path

import torch

from veneer.trainer.v1 import training_job_pb2
from veneer_trainer.worker.loop.batches import Step
from veneer_trainer.worker.loop.state import Figures
from veneer_trainer.worker.machine import available_memory_bytes

_WINDOW_S = 10.0
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Gauges:
    """Measures the steps of this process.

    Args:
        device: that takes them.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._steps: deque[tuple[float, int, int]] = deque()  # seconds, tokens, rows
        self._seconds = 0.0
        self._tokens = 0
        self._rows = 0

    def count(self, seconds: float, step: Step) -> None:
        """Notes a step; what is older than the last 10 seconds is dropped."""
        self._steps.append((seconds, step.tokens, step.rows))
        self._add(seconds, step.tokens, step.rows)
        while len(self._steps) > 1 and self._seconds - self._steps[0][0] >= _WINDOW_S:
            oldest = self._steps.popleft()
            self._add(-oldest[0], -oldest[1], -oldest[2])

    def progress(
        self, figures: Figures, total_steps: int, epoch: float, rate: float
    ) -> training_job_pb2.TrainingProgress:
        """Returns the figures at this step.

        Args:
            figures: of the run.
            total_steps: of the job.
            epoch: epochs done, with their fraction.
            rate: learning rate of the step.
        """
        progress = training_job_pb2.TrainingProgress(
            step=figures.step,
            total_steps=total_steps,
            epoch=epoch,
            loss=figures.loss,
            learning_rate=rate,
            gradient_norm=figures.gradient_norm,
            peak_memory_bytes=peak_memory_bytes(self._device),
        )
        if figures.validation_loss is not None:
            progress.validation_loss = figures.validation_loss
        if figures.best_validation_loss is not None:
            progress.best_validation_loss = figures.best_validation_loss
        if self._steps and self._seconds > 0:
            progress.tokens_per_second = self._tokens / self._seconds
            progress.rows_per_second = self._rows / self._seconds
            left_s = (total_steps - figures.step) * self._seconds / len(self._steps)
            progress.remaining.FromMilliseconds(round(left_s * 1000))
        progress.elapsed.FromMilliseconds(round(figures.elapsed_s * 1000))
        progress.measure_time.FromNanoseconds(time.time_ns())
        return progress

    def _add(self, seconds: float, tokens: int, rows: int) -> None:
        self._seconds += seconds
        self._tokens += tokens
        self._rows += rows


def free_memory_bytes(device: str) -> int:
    """Returns the memory of a device that this process may take still, what it holds without use included."""
    if device == "cpu":
        return available_memory_bytes()
    unused_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + unused_bytes


def peak_memory_bytes(device: str) -> int:
    """Returns the peak memory of this process on a device since `reset_peak_memory`, where the system can tell.

    On the CPU that is what was resident, elsewhere what its tensors took.
    """
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    try:
        status = _STATUS.read_text("ascii")
    except OSError:  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def give_back_memory() -> None:
    """Has the allocator give back what was freed, where it can (https://man7.org/linux/man-pages/man3/malloc_trim.3.html)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory(device: str) -> None:
    """Makes the peak what is taken now, where the system can (https://man7.org/linux/man-pages/man5/proc.5.html)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        give_back_memory()  # what was freed is not taken
        _CLEAR_REFS.write_text("5", "ascii")
