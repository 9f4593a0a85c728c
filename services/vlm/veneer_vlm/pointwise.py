"""Norm, gate and loss, forward and backward: by the compiled library in one pass, else by torch.

Owns what of them autograd remembers: the norm's input and a number a row, the gate's input, and of the loss its
gradient, in the logits' own place. torch would keep half a dozen float32 copies of a norm's input in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer_vlm import native


def rms_norm(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis (https://arxiv.org/abs/1910.07467); reduced in float32, rounded once."""
    by_library = native.takes(hidden) and hidden.ndim in (2, 3) and weight_D.dtype is hidden.dtype
    if not by_library or weight_D.requires_grad:
        return F.rms_norm(hidden, weight_D.shape, weight_D, eps)
    if hidden.requires_grad and torch.is_grad_enabled():
        normed: Tensor = _Norm.apply(hidden, weight_D, eps)  # type: ignore[no-untyped-call]
        return normed
    return _norm(hidden, weight_D, eps)[0]


def swiglu(gate_up_T_2W: Tensor) -> Tensor:
    """SwiGLU (https://arxiv.org/abs/2002.05202) of rows that are gate and up side by side, (T, W)."""
    width = gate_up_T_2W.shape[1] // 2
    if not (native.takes(gate_up_T_2W[:, :width]) and gate_up_T_2W.is_contiguous()):
        gate, up = torch.split(gate_up_T_2W, width, -1)
        return F.silu(gate) * up
    if gate_up_T_2W.requires_grad and torch.is_grad_enabled():
        gated: Tensor = _SwiGLU.apply(gate_up_T_2W)  # type: ignore[no-untyped-call]
        return gated
    return _swiglu(gate_up_T_2W)


def made_again(
    made: Tensor, make: Callable[[Tensor], Tensor], source: Tensor, *, wanted: bool
) -> AbstractContextManager[object]:
    """Within, autograd keeps not this tensor but makes it again of its source, which something else keeps.

    Not within a pass that is computed again as a whole (torch.utils.checkpoint), which keeps nothing by itself.

    Args:
        made: what `make` gave.
        make: a function of which each call gives the same bits.
        source: what it was given.
        wanted: else autograd keeps what it will.
    """
    if not (wanted and made.requires_grad and torch.is_grad_enabled()):
        return nullcontext()
    address, shape = made.data_ptr(), made.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == address and saved.shape == shape else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: make(source) if kept is None else kept)


def cross_entropy(logits_T_V: Tensor, targets_T: Tensor) -> Tensor:
    """The negative log-likelihood (T,) of each target, float32; the logits' memory may be used up."""
    if not (native.takes(logits_T_V) and logits_T_V.is_contiguous()):
        return F.cross_entropy(logits_T_V.float(), targets_T, reduction="none")
    if logits_T_V.requires_grad and torch.is_grad_enabled():
        losses_T: Tensor = _CrossEntropy.apply(logits_T_V, targets_T)  # type: ignore[no-untyped-call]
        return losses_T
    return _cross_entropy(logits_T_V, targets_T, gradient=False)


class _Context(Protocol):
    """What torch hands to both halves of a function."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        normed, scale = _norm(hidden, weight_D, eps)
        ctx.save_for_backward(hidden, weight_D, scale)
        return normed

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight_D, scale = ctx.saved_tensors
        grad = grad.contiguous()
        hidden_grad = torch.empty_like(grad)
        tensors = (hidden, weight_D, grad, hidden_grad, scale)
        native.loaded().veneer_norm_grad(_rows(hidden), *(tensor.data_ptr() for tensor in tensors))
        return hidden_grad, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, gate_up_T_2W: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_T_2W)
        return _swiglu(gate_up_T_2W)

    @staticmethod
    def backward(ctx: _Context, grad_T_W: Tensor) -> Tensor:
        (gate_up_T_2W,) = ctx.saved_tensors
        grad_T_W = grad_T_W.contiguous()
        gate_up_grad_T_2W = torch.empty_like(gate_up_T_2W)
        tensors = (gate_up_T_2W, grad_T_W, gate_up_grad_T_2W)
        native.loaded().veneer_swiglu_grad(
            *(tensor.data_ptr() for tensor in tensors), *grad_T_W.shape, grad_T_W.dtype is torch.bfloat16
        )
        return gate_up_grad_T_2W


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, logits_T_V: Tensor, targets_T: Tensor) -> Tensor:
        grad_T_V = logits_T_V.detach()
        losses_T = _cross_entropy(grad_T_V, targets_T, gradient=True)
        ctx.save_for_backward(grad_T_V)
        return losses_T

    @staticmethod
    def backward(ctx: _Context, losses_grad_T: Tensor) -> tuple[Tensor, None]:
        (grad_T_V,) = ctx.saved_tensors
        return grad_T_V * losses_grad_T.to(grad_T_V.dtype)[:, None], None


def _norm(hidden: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, contiguous, and what each row was multiplied by, float32."""
    normed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    scale = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
    tensors = (hidden, weight_D, normed, scale)
    native.loaded().veneer_norm(_rows(hidden), *(tensor.data_ptr() for tensor in tensors), eps)
    return normed, scale


def _rows(hidden: Tensor) -> native.Rows:
    *outer, width = hidden.shape
    inner, inner_stride = (outer[1], hidden.stride(1)) if len(outer) > 1 else (1, 0)
    return native.Rows(outer[0], inner, width, hidden.stride(0), inner_stride, hidden.dtype is torch.bfloat16)


def _swiglu(gate_up_T_2W: Tensor) -> Tensor:
    rows, width = len(gate_up_T_2W), gate_up_T_2W.shape[1] // 2
    gated_T_W = gate_up_T_2W.new_empty(rows, width)
    native.loaded().veneer_swiglu(
        gate_up_T_2W.data_ptr(), gated_T_W.data_ptr(), rows, width, gate_up_T_2W.dtype is torch.bfloat16
    )
    return gated_T_W


def _cross_entropy(logits_T_V: Tensor, targets_T: Tensor, *, gradient: bool) -> Tensor:
    """The losses; with `gradient` the logits are that of each row's loss afterwards.

    Raises:
        IndexError: a target is none of the V ids.
    """
    rows, width = logits_T_V.shape
    if rows and not 0 <= int(targets_T.min()) <= int(targets_T.max()) < width:
        raise IndexError(f"targets must lie between 0 and {width - 1}")
    targets_T = targets_T.contiguous()
    losses_T = logits_T_V.new_empty(rows, dtype=torch.float32)
    tensors = (logits_T_V, targets_T, losses_T)
    native.loaded().veneer_cross_entropy(
        *(tensor.data_ptr() for tensor in tensors), rows, width, logits_T_V.dtype is torch.bfloat16, gradient
    )
    return losses_T
