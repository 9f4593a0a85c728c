"""AdamW (https://arxiv.org/abs/1711.05101) as torch's fused kernel takes it.

Not `torch.optim.AdamW`, which does the same: making one imports torch's compiler, seconds of it and 70 MB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class AdamW:
    """Moves weights by their gradients.

    Args:
        weights: to move; those without a gradient stay.
        betas: decay of the two moments.
        weight_decay: share of a weight that goes in a step, times the learning rate.

    Attributes:
        state: the moments, by name, of each weight that has been moved.
    """

    def __init__(self, weights: Sequence[Tensor], betas: tuple[float, float], weight_decay: float) -> None:
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._weights = weights
        self._betas = betas
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Takes a step."""
        moved = [(weight, weight.grad) for weight in self._weights if weight.grad is not None]
        for weight, _ in moved:
            if weight not in self.state:
                self.state[weight] = {
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                    "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                }
        first, second, steps = ([self.state[weight][name] for weight, _ in moved] for name in MOMENTS)
        adamw(
            [weight for weight, _ in moved],
            [gradient for _, gradient in moved],
            first,
            second,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=learning_rate,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )

    def forget_gradients(self) -> None:
        """Drops the gradients."""
        for weight in self._weights:
            weight.grad = None
