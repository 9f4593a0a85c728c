"""Training: a resumed run is the run that was not stopped, and the lean forward pass is the library's."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from veneer_base import reading, shape
from veneer_base.batches import Composer
from veneer_base.loop import Run
from veneer_base.stages import STAGES
from veneer_base.vocabulary import CompactVocabulary, choose_ids, qwen_tokenizer

TOY = tuple(
    dataclasses.replace(stage, steps=2, sizes_px=((32, 96),), visual_tokens=6, fewest_pictures=2)
    for stage in (STAGES[0], STAGES[2])
)


@pytest.fixture(scope="module")
def vocabulary() -> CompactVocabulary:
    tokenizer = qwen_tokenizer()
    return CompactVocabulary(tokenizer, choose_ids(tokenizer))


def toy_run(vocabulary: CompactVocabulary, folder: Path) -> Run:
    return Run(shape.fresh_model(vocabulary, 0), Composer(vocabulary, 0), TOY, folder)


def test_a_resumed_run_is_the_run_that_was_not_stopped(vocabulary: CompactVocabulary, tmp_path: Path) -> None:
    whole = toy_run(vocabulary, tmp_path / "whole")
    whole.train(checkpoint_steps=1)
    stopped = toy_run(vocabulary, tmp_path / "stopped")
    stopped.train(checkpoint_steps=1, stop_at=(1, 1))
    resumed = toy_run(vocabulary, tmp_path / "stopped")
    resumed.load(tmp_path / "stopped" / "checkpoint.safetensors")
    assert resumed.at == (1, 1)
    resumed.train(checkpoint_steps=1)
    assert all(torch.equal(p, resumed.named[name]) for name, p in whole.named.items())


def test_questions_that_share_a_picture_are_read_as_the_library_reads_each_alone(vocabulary: CompactVocabulary) -> None:
    model = shape.fresh_model(vocabulary, 0).eval()
    pictures = np.random.default_rng(0).integers(0, 255, (2, 64, 128, 3), np.uint8)
    grid = reading.Grid(2, 4)
    patches_B_N_P = reading.patches(pictures)
    pads = "<|image_pad|>" * grid.tokens
    prefix = vocabulary.encode(f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>")
    asked = [vocabulary.encode(f"{text}<|im_end|>\n<|im_start|>assistant\n12") for text in ("第1行是什么?", "a")]
    ids = torch.tensor([[*prefix, *asked[0], *asked[1]]] * 2)
    segments = torch.tensor([[0] * len(prefix) + [1] * len(asked[0]) + [2] * len(asked[1])] * 2)
    with torch.no_grad():
        visual, taps = reading.see(model, patches_B_N_P, grid)
        states = reading.read(model, ids, segments, visual, taps, grid)
        moments = patches_B_N_P.view(-1, 3, 1, reading.PATCH_PX**2).expand(-1, -1, 2, -1).reshape(2 * 32, -1)
        for number, question in enumerate(asked, 1):
            alone = torch.tensor([[*prefix, *question]] * 2)
            expected = model.model(
                input_ids=alone,
                attention_mask=torch.ones_like(alone),
                pixel_values=moments,
                image_grid_thw=torch.tensor([[1, 4, 8]] * 2),
                mm_token_type_ids=(alone == model.config.image_token_id).long(),
            ).last_hidden_state
            torch.testing.assert_close(
                states[segments == number].view(2, len(question), -1), expected[:, len(prefix) :], rtol=0, atol=2e-5
            )
