from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.testing import assert_close

from veneer_vlm.attention import PackedAttention
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.weights import random_model

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Row, Toy

EXACT = {"rtol": 0, "atol": 1e-4}


def test_each_row_alone_has_the_peers_logits(toy: Toy, rows: list[Row]) -> None:
    for row in rows:
        (logits,) = toy.logits([row])
        assert logits.std() > 0.5  # or 1e-4 would say nothing
        assert_close(logits, toy.peer_logits(row), **EXACT)


def test_packed_rows_have_the_logits_of_each_alone(toy: Toy, rows: list[Row]) -> None:
    for row, logits in zip(rows, toy.logits(rows), strict=True):
        assert_close(logits, toy.peer_logits(row), **EXACT)


def test_a_tied_head_is_the_embedding(tied_toy: Toy, rows: list[Row]) -> None:
    for row, logits in zip(rows, tied_toy.logits(rows), strict=True):
        assert_close(logits, tied_toy.peer_logits(row), **EXACT)
    assert tied_toy.model.lm_head.weight is tied_toy.model.language_model.embed_tokens.weight


def test_bfloat16_stays_close_to_float32(toy: Toy, toy_directory: Path, rows: list[Row]) -> None:
    """The stated bound: a root-mean-square difference of 2 % of the logits' own."""
    from veneer_vlm.weights import load

    model = load(toy_directory, torch.bfloat16)
    with torch.no_grad():
        logits = model.logits(toy.hidden(rows, model=model)).float()
    exact = torch.cat(toy.logits(rows))
    assert (logits - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


def test_features_and_image_tokens_must_agree_in_number(toy: Toy, rows: list[Row]) -> None:
    row = rows[1]
    with pytest.raises(ValueError, match="6 image tokens, but features for 0"):
        toy.model(row.ids_T, toy.positions(row), PackedAttention([len(row.ids_T)]))


def test_a_base_is_frozen_and_random_weights_follow_their_seed(toy: Toy) -> None:
    model = random_model(toy.config, seed=3)
    again, other = random_model(toy.config, seed=3), random_model(toy.config, seed=4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.slots()[name], again.slots()[name])
    assert not torch.equal(model.slots()[name], other.slots()[name])
    assert model.slots()["model.visual.blocks.0.norm1.weight"].eq(1).all()


def test_every_parameter_has_its_slot(toy: Toy) -> None:
    model = VisionLanguageModel.empty(toy.config, device="meta")
    slots = sum(slot.numel() for slot in model.slots().values())
    assert slots == sum(parameter.numel() for parameter in model.parameters())
