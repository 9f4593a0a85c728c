"""The base's linears in bfloat16 on a CPU, packed once, for inference.

Owns whose layout a weight has. As it is stored, a weight is read at half of memory's pace by a few tokens' product; in
oneDNN's, at two thirds of it; in the library's own, at nine tenths. Neither wants another layout for many tokens.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from veneer_vlm import native
from veneer_vlm.model import VisionLanguageModel

SUPPORTED = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
"""Whether this CPU has products of bfloat16 matrices of its own."""

_LAID_OUT_FOR = 8  # tokens: oneDNN's best layout for 4 to 16 of those that were tried, and none is better for 512
_LEAST = 5  # tokens: oneDNN's product of fewer reads more slowly than one of so many


def pack(model: VisionLanguageModel) -> None:
    """Packs every linear of a model of bfloat16, in place; the model's `slots` are gone with its weights."""
    model.compute_by(PackedKernel)


class PackedKernel:
    """One linear; see `FusedLinear.kernel`.

    Args:
        weight_O_I: bfloat16; is copied.
        bias_O: bfloat16; kept.
    """

    def __init__(self, weight_O_I: Tensor, bias_O: Tensor | None) -> None:
        by = _library if native.multiplies(weight_O_I) else _onednn
        self._product = by(weight_O_I, bias_O)

    def __call__(self, input_T_I: Tensor) -> Tensor:
        """The product, (T, O), bfloat16."""
        return self._product(input_T_I)


def _library(weight_O_I: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    return partial(native.Weight(weight_O_I).product, bias_O=bias_O)


def _onednn(weight_O_I: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_O_I, _LAID_OUT_FOR)

    def product(input_T_I: Tensor) -> Tensor:
        tokens = len(input_T_I)
        if 0 < tokens < _LEAST:
            padded_M_I = input_T_I.new_zeros(_LEAST, input_T_I.shape[1])
            padded_M_I[:tokens] = input_T_I
            return product(padded_M_I)[:tokens]
        product_T_O: Tensor = torch.ops.mkldnn._linear_pointwise(input_T_I, packed, bias_O, "none", [], "")
        return product_T_O

    return product
