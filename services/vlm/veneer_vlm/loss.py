"""Cross-entropy at supervised positions, without ever holding all logits.

Owns the trade: the head's product is done a few positions at a time, and each chunk's gradient with respect
to the hidden states is taken at once (the idea of https://arxiv.org/abs/2411.09009 and of fused linear
cross-entropy kernels), so that neither (N, V) logits nor the head's graph outlive their chunk.
"""

from typing import Protocol

import torch
from torch import Tensor

from veneer_vlm.head import Head

CHUNK = 128  # positions: 78 MB of float32 logits at a vocabulary of 151,936, and half again as fast as 64


def token_losses(head: Head, hidden_N_D: Tensor, targets_N: Tensor, chunk: int = CHUNK) -> Tensor:
    """The negative log-likelihood (N,) of each target in float32.

    One loss a token, so that jobs sharing a pass can each reduce their own. Gradients flow to the hidden
    states; the head is frozen and gets none.

    Args:
        head: the model's `lm_head`.
        hidden_N_D: last hidden states at the positions that predict a target.
        targets_N: the id that each of them should predict.
        chunk: positions whose logits are held at once.
    """
    losses_N: Tensor = _ChunkedCrossEntropy.apply(hidden_N_D, targets_N, head, chunk)  # type: ignore[no-untyped-call]
    return losses_N


class _Context(Protocol):
    """What torch hands to both halves of a function."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden_N_D: Tensor,
        targets_N: Tensor,
        head: Head,
        chunk: int,
    ) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        needs_gradient = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(needs_gradient):
            chunks = zip(torch.split(hidden_N_D, chunk), torch.split(targets_N, chunk), strict=True)
            for hidden, targets in chunks:
                hidden = hidden.detach().requires_grad_(needs_gradient)
                loss = head.cross_entropy(hidden, targets)
                losses.append(loss.detach())
                if needs_gradient:
                    gradients += torch.autograd.grad(loss.sum(), hidden)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: _Context, losses_grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        # A token's loss depends on its own hidden state only, so the chain rule is a factor a row.
        (gradient_N_D,) = ctx.saved_tensors
        return (gradient_N_D * losses_grad_N[:, None]).to(gradient_N_D.dtype), None, None, None
