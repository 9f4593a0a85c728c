"""The arithmetic of adapters on linears that read one input, forward and backward, with little to remember.

Owns y_p + s dropout(x) A_pᵀ B_pᵀ for each of several linears p whose outputs y_p lie side by side, over stretches of
tokens that may each wear another adapter. Written by hand, because autograd would keep a copy of x in the adapter's
dtype, masked, and the mask, and would copy what it cuts: here x is kept once as it came, with the products of rank R,
the mask is drawn again, and y is added to where it lies. All linears see the same x dropped out, where PEFT draws for
each: one mask to draw and one product with all A, which halves what dropout costs beside a small base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from veneer_vlm.low_rank import add_products, exact, inner_products, outer_products


@dataclasses.dataclass(frozen=True)
class Update:
    """Which part of the outputs an adapter adds to, and what is done with the inputs and the products.

    Attributes:
        tokens: that wear it.
        columns: of the outputs, for each linear that it adapts.
        scale: s, dropout's own factor included.
        drop: sets to zero what drops out of the inputs (N, I), each time the same; None without dropout.
    """

    tokens: slice
    columns: tuple[slice, ...]
    scale: float
    drop: Callable[[Tensor], None] | None = None

    def inputs(self, input_T_I: Tensor, dtype: torch.dtype) -> Tensor:
        """Those of its tokens (N, I) without what drops out, for products with factors of a dtype."""
        if self.drop is None:
            return exact(input_T_I[self.tokens], dtype)
        exact_N_I = input_T_I[self.tokens].to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.drop(exact_N_I)
        return exact_N_I


def updated(updates: Sequence[Update], factors: Sequence[Tensor], input_T_I: Tensor, output_T_O: Tensor) -> Tensor:
    """The outputs (T, O) with the adapters' parts added, in their own memory: what went in is no more.

    A part is computed in its adapter's dtype, as PEFT does, and rounded once. Gradients flow to everything.

    Args:
        updates: over stretches of tokens that do not overlap.
        factors: for each update the A (R, I) of all its linears, then their B (O, R).
        input_T_I: what the linears read.
        output_T_O: what they made of it.
    """
    if not torch.is_grad_enabled():  # serving: the function is a quarter of what a token's update costs
        _add(updates, factors, input_T_I, output_T_O)
        return output_T_O
    added: Tensor = _Updated.apply(updates, input_T_I, output_T_O, *factors)  # type: ignore[no-untyped-call]
    return added


def _add(updates: Sequence[Update], factors: Sequence[Tensor], input_T_I: Tensor, output_T_O: Tensor) -> list[Tensor]:
    """Adds the adapters' parts to the outputs; each update's products of rank R."""
    inner = []
    for update, a_R_I, b_O_R in _grouped(updates, factors):
        inner_N_R = inner_products(update.inputs(input_T_I, a_R_I[0].dtype), _stacked(a_R_I)).mul_(update.scale)
        inner.append(inner_N_R)
        for columns, part_N_R, b in zip(update.columns, _split(inner_N_R, a_R_I), b_O_R, strict=True):
            add_products(output_T_O[update.tokens, columns], part_N_R, b.T)
    return inner


class _Context(Protocol):
    """What torch hands to both halves of a function."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    updates: Sequence[Update]

    def mark_dirty(self, *tensors: Tensor) -> None: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Updated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, updates: Sequence[Update], input_T_I: Tensor, output_T_O: Tensor, *factors: Tensor
    ) -> Tensor:
        inner = _add(updates, factors, input_T_I, output_T_O)
        ctx.mark_dirty(output_T_O)
        ctx.updates = updates
        ctx.save_for_backward(input_T_I, *inner, *factors)
        return output_T_O

    @staticmethod
    def backward(ctx: _Context, grad_T_O: Tensor) -> tuple[Tensor | None, ...]:
        input_T_I, *rest = ctx.saved_tensors
        inner, factors = rest[: len(ctx.updates)], rest[len(ctx.updates) :]
        input_grad_T_I = torch.zeros_like(input_T_I) if ctx.needs_input_grad[1] else None
        grads: list[Tensor] = []
        for (update, a_R_I, b_O_R), inner_N_R in zip(_grouped(ctx.updates, factors), inner, strict=True):
            dtype = inner_N_R.dtype
            parts = [exact(grad_T_O[update.tokens, columns], dtype) for columns in update.columns]
            products = zip(parts, _split(inner_N_R, a_R_I), strict=True)
            b_grads = [outer_products(part_N_R, grad_N_O).T for grad_N_O, part_N_R in products]
            inner_grads = [inner_products(grad_N_O, b.T) for grad_N_O, b in zip(parts, b_O_R, strict=True)]
            inner_grad_N_R = torch.cat(inner_grads, -1).mul_(update.scale)
            if input_grad_T_I is not None:
                if update.drop is None:
                    add_products(input_grad_T_I[update.tokens], inner_grad_N_R, _stacked(a_R_I))
                else:
                    grad_N_I = inner_grad_N_R @ _stacked(a_R_I)
                    update.drop(grad_N_I)
                    input_grad_T_I[update.tokens] = grad_N_I
            a_grad_R_I = outer_products(inner_grad_N_R, update.inputs(input_T_I, dtype))
            grads += [*torch.split(a_grad_R_I, [len(a) for a in a_R_I]), *b_grads]
        return None, input_grad_T_I, grad_T_O, *grads


def _grouped(
    updates: Sequence[Update], factors: Sequence[Tensor]
) -> Iterator[tuple[Update, Sequence[Tensor], Sequence[Tensor]]]:
    """Each update with its A and its B."""
    rest = iter(factors)
    for update in updates:
        yield update, [next(rest) for _ in update.columns], [next(rest) for _ in update.columns]


def _split(inner_N_R: Tensor, a_R_I: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.split(inner_N_R, [len(a) for a in a_R_I], dim=-1)


def _stacked(a_R_I: Sequence[Tensor]) -> Tensor:
    return a_R_I[0] if len(a_R_I) == 1 else torch.cat(list(a_R_I))
