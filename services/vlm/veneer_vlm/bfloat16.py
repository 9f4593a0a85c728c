"""The base's linears in bfloat16 on a CPU, packed once, for inference.

Owns whose layout a weight has. As it is stored, a weight is read at half of memory's pace by a few tokens' product; in
oneDNN's, at two thirds of it; in the library's own, at nine tenths. Neither wants another layout for many tokens.
"""

from collections.abc import Callable
from typing import Any

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
        self._bias_O = bias_O
        self._own = native.multiplies(weight_O_I)
        self._packed: Any = native.Weight(weight_O_I) if self._own else _of_onednn(weight_O_I)

    def __call__(self, input_T_I: Tensor) -> Tensor:
        """The product, (T, O), bfloat16."""
        if self._own:
            product_T_O: Tensor = self._packed.product(input_T_I, self._bias_O)
            return product_T_O
        tokens = len(input_T_I)
        if 0 < tokens < _LEAST:
            padded_M_I = input_T_I.new_zeros(_LEAST, input_T_I.shape[1])
            padded_M_I[:tokens] = input_T_I
            return self._times(padded_M_I)[:tokens]
        return self._times(input_T_I)

    def _times(self, input_T_I: Tensor) -> Tensor:
        times: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise
        return times(input_T_I, self._packed, self._bias_O, "none", [], "")


def _of_onednn(weight_O_I: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_O_I, _LAID_OUT_FOR)
    return packed
