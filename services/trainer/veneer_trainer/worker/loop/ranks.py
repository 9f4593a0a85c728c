"""Data parallel training: several processes, each with the whole base, that add up their adapters' gradients.

A step's rows are the job's own, however many ranks there are: they are cut into as many shares. Nothing but gradients
and a few figures travels, and every rank takes the same optimiser step. What a run decides by a clock or an order,
rank 0 decides. Started by torchrun, which sets RANK and WORLD_SIZE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from veneer_trainer.worker.refusal import Refused

_SILENCE_S = 900.0  # a step, a checkpoint, a base that loads: the trainer's own patience with a step


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        device: where figures lie that travel.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this one speaks for all."""
        return self.rank == 0

    @classmethod
    def joined(cls, meeting: Path, device: str, patience_s: float = 0.0) -> Ranks:
        """Meets the others that torchrun started.

        Args:
            meeting: a file that all of them reach, and that no other group has used.
            device: that each computes on, "cpu" or "cuda".
            patience_s: how long one of them may wait for something else, beyond what steps take.

        Raises:
            RuntimeError: the others do not come.
        """
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=_SILENCE_S + patience_s),
        )
        return cls(rank, size, device)

    def share(self, rows: int) -> slice:
        """Which of a step's rows are this rank's: neighbours, the same number for all but the last that have any."""
        each = -(-rows // self.size)
        return slice(min(self.rank * each, rows), min((self.rank + 1) * each, rows))

    def total(self, *figures: float) -> list[float]:
        """Returns each figure's sum over all ranks; raises Refused."""
        if self.size == 1:
            return list(figures)
        sums = torch.tensor(figures, dtype=torch.float64, device=self.device)
        _together(lambda: dist.all_reduce(sums))
        summed: list[float] = sums.tolist()
        return summed

    def agreed(self, *decisions: bool) -> list[bool]:
        """Returns what rank 0 has decided; raises Refused."""
        if self.size == 1:
            return list(decisions)
        told = torch.tensor(decisions, dtype=torch.uint8, device=self.device)
        _together(lambda: dist.broadcast(told, 0))
        return [bool(each) for each in told.tolist()]

    def add_gradients(self, weights: Sequence[Tensor]) -> None:
        """Makes each weight's gradient the sum of all ranks'; one that no rank has stays absent.

        Raises:
            Refused: another rank has ended.
        """
        if self.size == 1:
            return
        there = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.float32, device=self.device)
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        flat = torch.cat([there, *(gradient.flatten() for gradient in gradients)])
        _together(lambda: dist.all_reduce(flat))
        somewhere, *parts = torch.split(flat, [len(weights), *(weight.numel() for weight in weights)])
        for weight, part, count in zip(weights, parts, somewhere.tolist(), strict=True):
            weight.grad = part.view_as(weight) if count else None


def _together(act: Callable[[], object]) -> None:
    try:
        act()
    except RuntimeError as error:  # the agent is about to end this one too
        raise Refused("PROCESS_DIED", f"another rank has ended, or was silent: {error}", transient=True) from error


ALONE = Ranks()
