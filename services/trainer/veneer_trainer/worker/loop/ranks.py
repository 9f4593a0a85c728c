"""Data parallel training: several processes, each with the whole base, that add up their adapters' gradients.

A step's rows are cut into as many shares as there are ranks; nothing but gradients and a few figures travels, and every
rank takes the same optimiser step. Started by `torchrun`, which sets RANK, WORLD_SIZE and where they meet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Meets the others that torchrun started; alone where it started nobody.

        Raises:
            RuntimeError: the others do not come.
        """
        if int(environment.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, rows: int) -> slice:
        """Which of a step's rows are this rank's: neighbours, the same number for all but the last."""
        each = -(-rows // self.size)
        return slice(self.rank * each, min((self.rank + 1) * each, rows))

    def total(self, *figures: float) -> list[float]:
        """Returns each figure's sum over all ranks."""
        if self.size == 1:
            return list(figures)
        sums = torch.tensor(figures, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(sums)
        summed: list[float] = sums.tolist()
        return summed

    def add_gradients(self, weights: Sequence[Tensor]) -> None:
        """Makes each weight's gradient the sum of all ranks'; a rank without rows adds nothing."""
        if self.size == 1:
            return
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = torch.split(flat, [weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = part.view_as(weight)


ALONE = Ranks()
