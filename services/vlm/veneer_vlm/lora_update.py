"""The arithmetic of an adapter on linears that read one input, forward and backward, with little to remember.

Owns y_p + s dropout(x) A_pᵀ B_pᵀ for each of several linears p. Written by hand, because autograd would keep a
copy of x in the adapter's dtype, masked, and the mask: here x is kept once as it came, with the products of rank R,
and the mask is drawn again. All linears see the same x dropped out, where PEFT draws for each: one mask to draw and
one product with all A, which halves what dropout costs beside a small base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Update:
    """What is done with the inputs and the products.

    Attributes:
        scale: s, dropout's own factor included.
        drop: sets to zero what drops out of the inputs (T, I), each time the same; None without dropout.
    """

    scale: float
    drop: Callable[[Tensor], None] | None = None


def updated(
    update: Update, input_T_I: Tensor, outputs: Sequence[Tensor], a_R_I: Sequence[Tensor], b_O_R: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The outputs (T, O) of linears with an adapter's part added, in the outputs' dtype.

    The part is computed in the adapter's dtype, as PEFT does, and rounded once. Gradients flow to everything.
    """
    added: Sequence[Tensor] = _Updated.apply(update, len(outputs), input_T_I, *outputs, *a_R_I, *b_O_R)  # type: ignore[no-untyped-call]
    return added


class _Context(Protocol):
    """What torch hands to both halves of a function."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    update: Update
    parts: int

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Updated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, update: Update, parts: int, input_T_I: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, a_R_I, b_O_R = (tensors[at : at + parts] for at in (0, parts, 2 * parts))
        exact_T_I = _dropped(update, input_T_I, a_R_I[0].dtype)
        inner_T_R = update.scale * F.linear(exact_T_I, _stacked(a_R_I))
        inner = torch.split(inner_T_R, [len(a) for a in a_R_I], dim=-1)
        ctx.update, ctx.parts = update, parts
        ctx.save_for_backward(input_T_I, *a_R_I, *b_O_R, *inner)
        return tuple(_added(y, z, b) for y, z, b in zip(outputs, inner, b_O_R, strict=True))

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        update, parts = ctx.update, ctx.parts
        input_T_I, *rest = ctx.saved_tensors
        a_R_I, b_O_R, inner_T_R = (rest[at : at + parts] for at in (0, parts, 2 * parts))
        kind = a_R_I[0].dtype
        exact = [grad.to(kind) for grad in grads]
        b_grads = [grad.T @ z for grad, z in zip(exact, inner_T_R, strict=True)]
        inner_grad = torch.cat([grad @ b for grad, b in zip(exact, b_O_R, strict=True)], -1).mul_(update.scale)
        input_grad: Tensor | None = None
        if ctx.needs_input_grad[2]:
            input_grad = inner_grad @ _stacked(a_R_I)
            if update.drop is not None:
                update.drop(input_grad)
            input_grad = input_grad.to(input_T_I.dtype)
        a_grads = torch.split(inner_grad.T @ _dropped(update, input_T_I, kind), [len(a) for a in a_R_I])
        return None, None, input_grad, *grads, *a_grads, *b_grads


def _dropped(update: Update, input_T_I: Tensor, kind: torch.dtype) -> Tensor:
    """The inputs in the adapter's dtype, without what drops out."""
    if update.drop is None:
        return input_T_I.to(kind)
    exact_T_I = input_T_I.to(kind, copy=True, memory_format=torch.contiguous_format)
    update.drop(exact_T_I)
    return exact_T_I


def _stacked(a_R_I: Sequence[Tensor]) -> Tensor:
    return a_R_I[0] if len(a_R_I) == 1 else torch.cat(list(a_R_I))


def _added(output_T_O: Tensor, inner_T_R: Tensor, b_O_R: Tensor) -> Tensor:
    if output_T_O.dtype == b_O_R.dtype:
        return torch.addmm(output_T_O, inner_T_R, b_O_R.T)
    return F.linear(inner_T_R, b_O_R).add_(output_T_O).to(output_T_O.dtype)
