"""The one place where activations meet the base's weights.

Owns the seam at which a base linear may be computed in another way (packed for a CPU's GEMM, eight bits): its
`kernel` is another one, and nothing else in the model changes. What an adapter adds comes from `lora`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer_vlm import native

LARGE = 1 << 20
"""Numbers of a weight that is worth a way of its own: in memory as it is stored, and on a CPU by oneDNN."""

_AT_ONCE = 512  # outputs or inputs of a weight: what was widened stays in a core's cache until it is multiplied
_TALL = 1 << 15  # outputs: so many inputs of such a weight, a head's, are no small piece of it
_ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class Adapters(Protocol):
    """What the tokens of this pass wear."""

    def add(self, columns: Mapping[str, slice], input_T_I: Tensor, output_T_O: Tensor) -> Tensor:
        """The outputs of linears which all read `input_T_I`, with the adapters' part added, in their own memory.

        Args:
            columns: of the outputs, by the linear's name.
            input_T_I: what the linears read.
            output_T_O: what the base makes of it; its memory is the result's.
        """
        ...

    def merged(self, size: int) -> "Adapters":
        """The same adapters once each `size` neighbouring rows have become one."""
        ...

    def rows(self, start: int, stop: int) -> "Adapters":
        """What these rows of the pass wear, by themselves."""
        ...


def embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding without values.

    torch would draw some, and to draw them on the meta device it imports its compiler: two seconds of every process.
    """
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))


def product(input_T_I: Tensor, weight_O_I: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Inputs times a frozen weight, (T, O); gradients flow to the inputs alone.

    A weight of another dtype than the inputs' is converted a piece at a time, and never there as a whole: one that is
    stored in fewer bits takes no more memory than that, and says the same.
    """
    by: type[torch.autograd.Function] = _Product
    if native.multiplies(weight_O_I, input_T_I.dtype):
        by = _OfLibrary
    elif weight_O_I.dtype is input_T_I.dtype and not _by_onednn(weight_O_I, input_T_I.dtype):
        return F.linear(input_T_I, weight_O_I, bias_O)
    product_T_O: Tensor = by.apply(input_T_I, weight_O_I, bias_O)  # type: ignore[no-untyped-call]
    return product_T_O


class _Context(Protocol):
    """What torch hands to both halves of a function."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _OfLibrary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, input_T_I: Tensor, weight_O_I: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_O_I)
        return native.product_stored(input_T_I, weight_O_I, bias_O)

    @staticmethod
    def backward(ctx: _Context, grad_T_O: Tensor) -> tuple[Tensor, None, None]:
        (weight_O_I,) = ctx.saved_tensors
        return native.product_stored(grad_T_O, weight_O_I, turned=True), None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, input_T_I: Tensor, weight_O_I: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_O_I)
        times = _onednn if _by_onednn(weight_O_I, input_T_I.dtype) else F.linear
        rows = [weight_O_I] if weight_O_I.dtype is input_T_I.dtype else torch.split(weight_O_I, _AT_ONCE)
        product_T_O = _beside(times(input_T_I, rows_N_I) for rows_N_I in _converted(rows, input_T_I.dtype))
        return product_T_O if bias_O is None else product_T_O.add_(bias_O)

    @staticmethod
    def backward(ctx: _Context, grad_T_O: Tensor) -> tuple[Tensor, None, None]:
        (weight_O_I,) = ctx.saved_tensors
        if len(weight_O_I) < _TALL:  # MKL's product is quicker by pieces than as a whole, also where none is widened
            columns = _converted(torch.split(weight_O_I, _AT_ONCE, 1), grad_T_O.dtype)
            return _beside(grad_T_O @ columns_O_N for columns_O_N in columns), None, None
        times = _onednn if _by_onednn(weight_O_I, grad_T_O.dtype) else F.linear
        grad_T_I = grad_T_O.new_zeros(len(grad_T_O), weight_O_I.shape[1])
        rows = _converted(torch.split(weight_O_I, _AT_ONCE), grad_T_O.dtype)
        for grad_T_N, rows_N_I in zip(torch.split(grad_T_O, _AT_ONCE, 1), rows, strict=True):
            grad_T_I += times(grad_T_N, rows_N_I.t())
        return grad_T_I, None, None


def _by_onednn(weight_O_I: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in a dtype go through oneDNN: torch's own way, MKL, takes up to twice as long on AMD's."""
    large = dtype is torch.float32 and weight_O_I.device.type == "cpu" and weight_O_I.numel() >= LARGE
    return large and _ONEDNN


def _onednn(input_T_I: Tensor, weight_O_I: Tensor) -> Tensor:
    product_T_O: Tensor = torch.ops.mkldnn._linear_pointwise(input_T_I, weight_O_I, None, "none", [], "")
    return product_T_O


def _converted(pieces: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Pieces of a weight in a dtype, one after the other in one place: each is gone when the next one comes."""
    if pieces[0].dtype is dtype:
        yield from pieces
        return
    place = pieces[0].new_empty(pieces[0].numel(), dtype=dtype)
    for piece in pieces:
        yield place[: piece.numel()].view(piece.shape).copy_(piece)


def _beside(parts: Iterable[Tensor]) -> Tensor:
    """Products (T, N) side by side."""
    made = list(parts)
    return made[0] if len(made) == 1 else torch.cat(made, -1)


class FusedLinear(nn.Module):
    """Linears of the checkpoint that read the same input, as one GEMM.

    Attributes:
        parts: the last component of each linear's name in the checkpoint, with its number of outputs.
        names: each linear's whole name; the model sets it when it is put together.
        kernel: computes the base's product (T, O) in place of the weight; None for the weight itself.
    """

    def __init__(self, inputs: int, parts: dict[str, int], *, bias: bool = False) -> None:
        super().__init__()
        self.parts = parts
        self.names: tuple[str, ...] = tuple(parts)
        outputs = sum(parts.values())
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.kernel: Callable[[Tensor], Tensor] | None = None

    @property
    def weight_outputs(self) -> int:
        """O, of all parts together."""
        return sum(self.parts.values())

    def slots(self) -> dict[str, Tensor]:
        """Where each tensor of the checkpoint goes: views of this module's parameters."""
        slots = {}
        for name, columns in self.columns().items():
            slots[f"{name}.weight"] = self.weight.data[columns]
            if self.bias is not None:
                slots[f"{name}.bias"] = self.bias.data[columns]
        return slots

    def columns(self) -> dict[str, slice]:
        """Where the outputs of each linear lie, by its name in the checkpoint."""
        stops = itertools.accumulate(self.parts.values(), initial=0)
        return dict(zip(self.names, itertools.starmap(slice, itertools.pairwise(stops)), strict=True))

    def project(self, input_T_I: Tensor) -> Tensor:
        """The base's product alone, (T, O)."""
        if self.kernel is not None:
            return self.kernel(input_T_I)
        return product(input_T_I, self.weight, self.bias)

    def forward(self, input_T_I: Tensor, lora: Adapters | None) -> Sequence[Tensor]:
        """The output (T, outputs) of each part."""
        return torch.split(self.adapted(input_T_I, lora), list(self.parts.values()), dim=-1)

    def adapted(self, input_T_I: Tensor, lora: Adapters | None) -> Tensor:
        """The outputs (T, O) of all parts, side by side."""
        output_T_O = self.project(input_T_I)
        return output_T_O if lora is None else lora.add(self.columns(), input_T_I, output_T_O)


class Linear(FusedLinear):
    """A single linear of the checkpoint."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, {"": outputs}, bias=bias)

    def forward(self, input_T_I: Tensor, lora: Adapters | None) -> Tensor:  # type: ignore[override]  # one part
        """The output, (T, O)."""
        return self.adapted(input_T_I, lora)
