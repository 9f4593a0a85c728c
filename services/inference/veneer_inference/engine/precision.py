"""How a base's numbers are held: what was asked for, or what this machine does fast and a held-out check allows.

The check compares the base in eight bits with the base in floats, on conversations that no engine has quantised by:
at each token of their answers the two predict nearly the same distribution, and the same likeliest token wherever that
is not a tie.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from veneer_processing import Conversation, Encoded, Message, Picture, Processor, Text
from veneer_vlm import bfloat16, half
from veneer_vlm.attention import PackedAttention
from veneer_vlm.int8 import pays, quantise
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.weights import load

_LOG = logging.getLogger(__name__)
TIE = 0.125  # two logits that lie nearer than this may change places in eight bits
MOST_DIVERGENCE = 0.05  # nats a token
LEAST_AGREEMENT = 0.98  # of the tokens that are no tie
_HELD_OUT = (
    ("Which colour has a ripe banana?", "A ripe banana is yellow."),
    ("请提取发票的号码和金额。", '{"号码": "20481726", "金额": "¥8,650"}'),
    ("Extract the fields as JSON.", '{"name": "Maria Stone", "department": "Sales", "days": "3"}'),
    ("这张单据写了什么?", "这是一张请假申请表,申请人张伟,部门技术部,请假3天。"),
    ("How many rows does the table have?", "The table has three columns and twelve rows; the total is 5,999.00."),
    ("What is 17 + 25?", "17 + 25 = 42"),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far eight bits are from floats.

    Attributes:
        divergence: mean Kullback-Leibler divergence of a token's prediction, in nats.
        agreement: share of tokens with the same likeliest token, among those that are no tie.
    """

    divergence: float
    agreement: float

    @property
    def allowed(self) -> bool:
        """Whether answers may be given so; never where a number went astray."""
        return self.divergence <= MOST_DIVERGENCE and self.agreement >= LEAST_AGREEMENT


def load_base(directory: Path, dtype: str, device: str, *, as_stored: bool = False) -> tuple[VisionLanguageModel, str]:
    """The base in a precision, and that precision's name.

    Args:
        directory: of the base.
        dtype: "float32", "bfloat16", "int8", or "auto": eight bits on a CPU that multiplies them, where the check
            allows it, else the fastest floats of the machine.
        device: "cpu" or "cuda".
        as_stored: whether large weights stay in the bits that they are stored in.

    Raises:
        RefusedError, ProcessingError: see `weights.load` and `Processor.load`.
        ValueError: eight bits were asked for elsewhere than on a CPU.
    """
    floats = "bfloat16" if device == "cuda" or bfloat16.SUPPORTED else "float32"
    if dtype == "auto" and (device == "cuda" or not pays()):
        dtype = floats
    if dtype in ("float32", "bfloat16"):
        return _in_floats(directory, dtype, device, as_stored), dtype
    model = load(directory, getattr(torch, floats), device, as_stored=True)
    if dtype == "int8":
        quantise(model)
        return model, "int8"
    difference = quantised_difference(model, directory)
    _LOG.warning(
        "eight bits %s: divergence %.4f nats a token (at most %s), agreement %.4f (at least %s)",
        "serve" if difference.allowed else f"do not serve, {floats} does",
        difference.divergence, MOST_DIVERGENCE, difference.agreement, LEAST_AGREEMENT,
    )  # fmt: skip
    if difference.allowed:
        return model, "int8"
    return _in_floats(directory, floats, device, as_stored), floats


def _in_floats(directory: Path, dtype: str, device: str, as_stored: bool) -> VisionLanguageModel:
    """The base in floats; what was stored in sixteen bits stays so for float32 where the CPU multiplies by it."""
    packs = dtype == "float32" and device == "cpu" and half.SUPPORTED
    model = load(directory, getattr(torch, dtype), device, as_stored=as_stored or packs)
    if packs:
        half.pack(model, as_stored=as_stored)
    if dtype == "bfloat16" and device == "cpu" and bfloat16.SUPPORTED:
        bfloat16.pack(model)
    return model


@torch.inference_mode()
def quantised_difference(model: VisionLanguageModel, directory: Path) -> Difference:
    """Quantises a model of floats, in place, and says what that changed on the held-out conversations."""
    encoded = _held_out(Processor.load(directory, ""))
    before = [_predictions(model, each) for each in encoded]
    quantise(model)
    divergences, agreements = [], []
    for each, floats_N_V in zip(encoded, before, strict=True):
        eight_N_V = _predictions(model, each)
        divergences.append((floats_N_V.exp() * (floats_N_V - eight_N_V)).sum(-1))
        best_N_2 = floats_N_V.topk(2).values
        clear_N = best_N_2[:, 0] - best_N_2[:, 1] > TIE
        agreements.append((floats_N_V.argmax(-1) == eight_N_V.argmax(-1))[clear_N].float())
    agreed = torch.cat(agreements)
    return Difference(torch.cat(divergences).mean().item(), agreed.mean().item() if len(agreed) else 1.0)


def _held_out(processor: Processor) -> list[Encoded]:
    """Each question with its answer, every other one about a picture of stripes."""
    encoded = []
    for number, (question, answer) in enumerate(_HELD_OUT):
        parts: tuple[Text | Picture, ...] = (Text(question),)
        if number % 2:
            rgb = np.full((96, 160, 3), 255, np.uint8)
            rgb[:: 8 + number, 16:144] = 32
            parts = (Picture(f"{number:064}", 160, 96, rgb), *parts)
        encoded.append(processor.encode(Conversation((Message("user", parts), Message("assistant", (Text(answer),))))))
    return encoded


def _predictions(model: VisionLanguageModel, encoded: Encoded) -> Tensor:
    """Log-probabilities (N, V) that predict the answer's tokens, float32."""
    grids = [(int(t), int(h), int(w)) for t, h, w in encoded.grids_n_3]
    visual = model.see(torch.from_numpy(encoded.patches_N_P), grids) if grids else None
    hidden_T_D = model(
        torch.from_numpy(encoded.ids_T),
        torch.from_numpy(encoded.positions_3_T),
        PackedAttention([len(encoded.ids_T)]),
        visual,
    )
    predicting_N = torch.from_numpy(encoded.supervised_T.nonzero()[0] - 1)
    return model.logits(hidden_T_D[predicting_N]).float().log_softmax(-1)
