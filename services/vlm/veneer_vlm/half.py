"""The base's linears in half precision on a CPU, for inference in float32.

Owns the way to read half as much: FBGEMM keeps a weight in half precision, packed once, widens it in registers, and
multiplies and adds in float32. What was stored in bfloat16 has eight bits, half precision holds eleven: nothing is lost
but of numbers below 2^-17, which lose at most 2^-25. Sixteen bits that half precision would lose more of, very large or
very small ones, are widened once instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer_vlm.linear import product
from veneer_vlm.model import VisionLanguageModel

SUPPORTED = torch.backends.quantized.engine in ("fbgemm", "x86")
"""Whether this CPU has FBGEMM's products: one of x86 with AVX2."""

_MOST_LOSS = 2.0**-20  # of a weight's norm: less than a sum of thousands of float32 products rounds
_PACKED_AT_ONCE = 2048  # outputs: a few rows' products with so many go through the weight once, not by twos


def pack(model: VisionLanguageModel, *, as_stored: bool = False) -> None:
    """Packs every weight that the model holds in sixteen bits, in place; the model's `slots` are gone with them.

    Args:
        model: of float32, its large weights as they were stored; on a CPU that is SUPPORTED.
        as_stored: whether a weight that half precision does not hold stays as it is, or is widened.
    """

    def kernel(weight_O_I: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        if weight_O_I.dtype not in (torch.bfloat16, torch.float16):
            return None
        packed = HalfKernel.of(weight_O_I, bias_O)
        if packed is not None or as_stored:
            return packed
        wide_O_I = weight_O_I.float()
        return lambda input_T_I: product(input_T_I, wide_O_I, bias_O)

    model.compute_by(kernel)


class HalfKernel:
    """One linear; see `FusedLinear.kernel`. `of` makes it."""

    def __init__(self, packed: list[Any]) -> None:
        self._packed = packed

    @classmethod
    def of(cls, weight_O_I: Tensor, bias_O: Tensor | None) -> HalfKernel | None:
        """Packs a weight; None where half precision says less than it, by more than the sums of a product lose.

        Args:
            weight_O_I: any float; is copied.
            bias_O: float32; is copied.
        """
        packed = []
        pieces = torch.split(weight_O_I, _PACKED_AT_ONCE)
        biases = [None] * len(pieces) if bias_O is None else torch.split(bias_O, _PACKED_AT_ONCE)
        # All of it in a few places: a new one for each piece costs more than what is done there.
        wide, back = (weight_O_I.new_empty(pieces[0].shape, dtype=torch.float32) for _ in range(2))
        halved = torch.empty_like(wide, dtype=torch.float16)
        for piece_N_I, bias_N in zip(pieces, biases, strict=True):
            wide_N_I, back_N_I, halved_N_I = (place[: len(piece_N_I)] for place in (wide, back, halved))
            back_N_I.copy_(halved_N_I.copy_(wide_N_I.copy_(piece_N_I))).sub_(wide_N_I)
            if not torch.linalg.vector_norm(back_N_I) <= _MOST_LOSS * torch.linalg.vector_norm(wide_N_I):
                return None  # so too where a number went astray
            packed.append(torch.ops.quantized.linear_prepack_fp16(wide_N_I, bias_N))
        return cls(packed)

    def __call__(self, input_T_I: Tensor) -> Tensor:
        """The product, (T, O), float32."""
        products: list[Tensor] = [torch.ops.quantized.linear_dynamic_fp16(input_T_I, each) for each in self._packed]
        return products[0] if len(products) == 1 else torch.cat(products, -1)
