"""The base as jobs train on it, with no more in memory at a time than a step has a use for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from veneer_trainer.worker.loop.gauges import give_back_memory
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.weights import load

_LAYERS = 7  # of the decoder, and blocks of the tower, from one time that memory is given back to the next
_WORTH_BYTES = 1 << 20  # of a layer's output: some ten times as much of what it freed is not used again


def load_base(directory: Path, dtype: torch.dtype, device: str) -> VisionLanguageModel:
    """Returns a base for training.

    On a CPU a frozen tower's weights leave memory behind the picture that goes through them, and what the allocator
    cannot use again is given back within a pass: glibc (2.36 was measured) finds no aligned place in one just as large
    that was freed.

    Raises:
        ConfigError, WeightsError: it cannot be read.
    """
    model = load(directory, dtype, device, as_stored=True, tower_mapped=True)
    model.lm_head.distinct()  # now, not while a pass holds its activations
    give_back_memory()  # a thread's own heap, that of loading, is nothing to the thread that takes steps
    if device == "cpu":
        for layer in model.language_model.layers[_LAYERS - 1 :: _LAYERS]:
            layer.register_forward_hook(_in_a_pass)

        def behind_a_picture(*_: object) -> None:
            if not torch.is_grad_enabled():
                model.let_go_of_tower()

        for block in model.visual.blocks[_LAYERS - 1 :: _LAYERS]:
            block.get_submodule("mlp").register_forward_hook(behind_a_picture)
        model.visual.merger.register_forward_hook(behind_a_picture)
    return model


def _in_a_pass(layer: nn.Module, inputs: object, output_T_D: Tensor) -> None:
    """Gives back memory here and where the gradient comes by."""
    if output_T_D.requires_grad and output_T_D.nbytes >= _WORTH_BYTES:
        give_back_memory()
        output_T_D.register_hook(lambda gradient: give_back_memory())  # type: ignore[no-untyped-call]
