"""The base's linears in eight bits on a CPU, for inference.

Owns quantisation and the integer product: weights symmetric with a scale an output, packed once for oneDNN; activations
symmetric with a scale a token, found as they come (as in https://arxiv.org/abs/2208.07339, without its outliers). The
sums are integers, and exact: what a token gets depends on no other token of its pass, however many there are. A CPU
without VNNI adds pairs of products in sixteen bits, which saturate: there activations go in two halves of four bits.

A head that has its distinct rows found (`head`) keeps them as they are: they are few.
"""

import torch
from torch import Tensor

from veneer_vlm.head import Head
from veneer_vlm.linear import FusedLinear
from veneer_vlm.model import VisionLanguageModel

_GREATEST = 127
_ZERO_POINT = 128  # oneDNN's products take unsigned activations
_HALF = 16
SATURATES = not torch.cpu._is_vnni_supported()
_LEAST_SCALE = 1e-10  # a token of zeros has no scale of its own


def quantise(model: VisionLanguageModel) -> None:
    """Turns every linear of a model to eight bits, in place, one at a time; its float weights are let go of.

    Embeddings, norms, patch positions and biases stay as they are. The model's `slots` are gone with its weights.

    Raises:
        ValueError: the model is not on a CPU.
    """
    if model.device.type != "cpu":
        raise ValueError(f"eight bits are for CPUs, the model is on {model.device}")
    for module in model.modules():
        if isinstance(module, FusedLinear) and not (isinstance(module, Head) and module.distinct() is not None):
            module.kernel = Int8Kernel(module.weight.data, None if module.bias is None else module.bias.data)
            if module is not model.lm_head or not model.config.tie_word_embeddings:
                module.weight = torch.nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def quantised(rows_N_I: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in eight bits: integers (N, I) within ±127, still as float32, and scales (N, 1).

    A row whose numbers went astray has a scale that did: so does its product.
    """
    rows_N_I = rows_N_I.float()
    scale_N_1 = rows_N_I.abs().amax(-1, keepdim=True).clamp_(min=_LEAST_SCALE) / _GREATEST
    return (rows_N_I / scale_N_1).round_(), scale_N_1


class Int8Kernel:
    """One linear; see `FusedLinear.kernel`.

    Args:
        weight_O_I: float; is copied.
        bias_O: float; kept.
    """

    def __init__(self, weight_O_I: Tensor, bias_O: Tensor | None) -> None:
        integers_O_I, scale_O_1 = quantised(weight_O_I)
        self._packed = torch.ops.onednn.qlinear_prepack(integers_O_I.to(torch.int8), None)
        self._scale_O = scale_O_1.squeeze(-1).contiguous()
        # Halves are scaled once they are added: till then their sums are exact in float32 too.
        self._sums_scale_O = torch.ones_like(self._scale_O) if SATURATES else self._scale_O
        self._zero_O = torch.zeros(len(weight_O_I), dtype=torch.int64)
        self._bias_O = bias_O

    def __call__(self, input_T_I: Tensor) -> Tensor:
        """The product, (T, O), in the input's dtype."""
        integers_T_I, scale_T_1 = quantised(input_T_I)
        if SATURATES:
            high_T_I = integers_T_I.div(_HALF).round_()
            low_T_I = integers_T_I - _HALF * high_T_I
            sums_T_O = self._sums(low_T_I).add_(self._sums(high_T_I), alpha=_HALF).mul_(self._scale_O)
        else:
            sums_T_O = self._sums(integers_T_I)
        output_T_O: Tensor = sums_T_O.mul_(scale_T_1)
        if self._bias_O is not None:
            output_T_O += self._bias_O
        return output_T_O.to(input_T_I.dtype)

    def _sums(self, integers_T_I: Tensor) -> Tensor:
        """The integer product, scaled unless it is a half's, (T, O) in float32; changes its input."""
        zero_point = _HALF if SATURATES else _ZERO_POINT
        unsigned_T_I = integers_T_I.add_(zero_point).to(torch.uint8)
        scales = (1.0, zero_point, self._packed, self._sums_scale_O, self._zero_O)
        sums_T_O: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned_T_I, *scales, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return sums_T_O
