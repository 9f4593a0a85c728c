"""The base's linears in eight bits on a CPU, for inference.

Owns quantisation and the integer product: weights symmetric with a scale an output, packed once; activations from a
token's least to its greatest, found as they come (as in https://arxiv.org/abs/2208.07339, without its outliers: with
one of them in a token the middle of its range halves its harm). The sums are integers, and exact: what a token gets
depends on no other token of its pass, however many there are.

Where the CPU has VNNI the library multiplies, or oneDNN. One without it adds the products of two neighbours in sixteen
bits, which saturate: there activations have 241 levels, an output's scale is such that two weights of one sign are 136
together at most (240 x 136 fits), and FBGEMM multiplies, in a third of oneDNN's time for a few rows.
"""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer_vlm import native
from veneer_vlm.model import VisionLanguageModel

SATURATES = not torch.cpu._is_vnni_supported()
_GREATEST = 127  # of a weight
_GREATEST_PAIR = 136  # of two neighbours of one sign, where more SATURATES
_ZERO_POINT = 120 if SATURATES else 127  # activations are as great as this; products take them unsigned
_AT_ONCE = 2048  # outputs that are in floats while they are quantised
_LEAST_SCALE = 1e-10  # a token of equal numbers has no scale of its own


def quantise(model: VisionLanguageModel) -> None:
    """Turns every linear of a model to eight bits, in place; its float weights are let go of.

    Embeddings, norms, patch positions and biases stay as they are. The model's `slots` are gone with its weights.

    Raises:
        ValueError: the model is not on a CPU.
    """
    if model.device.type != "cpu":
        raise ValueError(f"eight bits are for CPUs, the model is on {model.device}")
    _has_fbgemm()  # found out here: kernels are made in threads, which share what is done about warnings
    model.compute_by(Int8Kernel)


def pays() -> bool:
    """Whether this CPU multiplies eight bits faster than floats."""
    return not SATURATES or _has_fbgemm()


def quantised(rows_N_I: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row of activations in eight bits.

    A row whose numbers went astray has a scale that did: so does its product.

    Returns:
        integers (N, I), still as float32; scales (N, 1); what is zero in integers (N, 1), the middle of a row's range.
    """
    rows_N_I = rows_N_I.float()
    least_N_1, greatest_N_1 = rows_N_I.aminmax(dim=-1, keepdim=True)
    middle_N_1 = (least_N_1 + greatest_N_1) / 2
    # Of both ends, since the middle is rounded: no integer may be past the zero point.
    scale_N_1 = torch.maximum(greatest_N_1 - middle_N_1, middle_N_1 - least_N_1).clamp_(min=_LEAST_SCALE) / _ZERO_POINT
    return (rows_N_I - middle_N_1).div_(scale_N_1).round_(), scale_N_1, middle_N_1


def quantised_weight(weight_O_I: Tensor) -> tuple[Tensor, Tensor]:
    """Each output's weights in eight bits: integers (O, I), still as float32, and scales (O, 1)."""
    weight_O_I = weight_O_I.float()
    scale_O = weight_O_I.abs().amax(-1) / _GREATEST
    if SATURATES:
        pairs_O_J_2 = F.pad(weight_O_I, (0, weight_O_I.shape[1] % 2)).reshape(len(weight_O_I), -1, 2)
        for one_sign_O_J_2 in (pairs_O_J_2, -pairs_O_J_2):
            greatest_O = one_sign_O_J_2.clamp(min=0).sum(-1).amax(-1)
            scale_O = torch.maximum(scale_O, greatest_O / (_GREATEST_PAIR - 1))  # each is rounded up by a half at most
    scale_O_1 = scale_O.clamp_(min=_LEAST_SCALE)[:, None]
    return (weight_O_I / scale_O_1).round_(), scale_O_1


class Int8Kernel:
    """One linear; see `FusedLinear.kernel`.

    Args:
        weight_O_I: float; is copied.
        bias_O: float; kept.
    """

    def __init__(self, weight_O_I: Tensor, bias_O: Tensor | None) -> None:
        integers_O_I = torch.empty_like(weight_O_I, dtype=torch.int8)
        scale_O = weight_O_I.new_empty(len(weight_O_I), dtype=torch.float32)
        places = zip(torch.split(integers_O_I, _AT_ONCE), torch.split(scale_O, _AT_ONCE), strict=True)
        for rows_N_I, (integers_N_I, scale_N) in zip(torch.split(weight_O_I, _AT_ONCE), places, strict=True):
            found_N_I, scale_N_1 = quantised_weight(rows_N_I)
            integers_N_I.copy_(found_N_I)
            scale_N.copy_(scale_N_1[:, 0])
        whole_O = integers_O_I.sum(-1, dtype=torch.int32)
        self._sum_O = whole_O * scale_O
        self._bias_O = bias_O
        self._weight: native.Weight | None = None
        if native.multiplies(integers_O_I):
            self._weight = native.Weight(integers_O_I)
            self._of_outputs = _ZERO_POINT * whole_O, scale_O, self._sum_O
        else:
            by = _fbgemm if SATURATES and _has_fbgemm() else _onednn
            self._product = by(integers_O_I, scale_O)

    def __call__(self, input_T_I: Tensor) -> Tensor:
        """The product, (T, O), in the input's dtype."""
        if self._weight is not None:
            rows = native.quantised(input_T_I, _ZERO_POINT, _LEAST_SCALE)
            return self._weight.product_int8(rows, self._bias_O, *self._of_outputs)
        integers_T_I, scale_T_1, middle_T_1 = quantised(input_T_I)
        output_T_O = self._product(integers_T_I).mul_(scale_T_1).addcmul_(middle_T_1, self._sum_O)
        if self._bias_O is not None:
            output_T_O += self._bias_O
        return output_T_O.to(input_T_I.dtype)


def _onednn(integers_O_I: Tensor, scale_O: Tensor) -> Callable[[Tensor], Tensor]:
    """The product of integers (T, I) as `quantised` gives them with these: exact sums times the scales, (T, O)."""
    packed = torch.ops.onednn.qlinear_prepack(integers_O_I, None)
    zero_O = torch.zeros(len(scale_O), dtype=torch.int64)

    def product(integers_T_I: Tensor) -> Tensor:
        unsigned_T_I = integers_T_I.add_(_ZERO_POINT).to(torch.uint8)
        scales = (1.0, _ZERO_POINT, packed, scale_O, zero_O)
        product_T_O: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned_T_I, *scales, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product_T_O

    return product


def _fbgemm(integers_O_I: Tensor, scale_O: Tensor) -> Callable[[Tensor], Tensor]:
    """The same as `_onednn`."""
    zero_O = torch.zeros(len(scale_O), dtype=torch.int64)
    weight_O_I = torch._make_per_channel_quantized_tensor(integers_O_I, scale_O.double(), zero_O, 0)
    packed = torch.ops.quantized.linear_prepack(weight_O_I, None)

    def product(integers_T_I: Tensor) -> Tensor:
        product_T_O: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            integers_T_I, 1.0, _ZERO_POINT, packed
        )
        return product_T_O

    return product


@functools.cache
def _has_fbgemm() -> bool:
    """Whether this torch has FBGEMM's products on this CPU, one of x86 with AVX2."""
    if torch.backends.quantized.engine not in ("fbgemm", "x86"):
        return False
    with warnings.catch_warnings():
        # Torch says once that its quantised dtypes will go (pytorch/pytorch#184982). The one that packs is needed
        # while its release is pinned; when it is gone oneDNN multiplies, and this says so.
        warnings.simplefilter("ignore", UserWarning)
        try:
            _fbgemm(torch.ones(1, 8, dtype=torch.int8), torch.ones(1))(torch.ones(1, 8))
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
    return True
