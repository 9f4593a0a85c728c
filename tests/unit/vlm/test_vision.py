from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.testing import assert_close

from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig, Segment
from veneer_vlm.vision import VisualFeatures

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Toy

GRIDS = [(1, 4, 6), (1, 2, 2), (1, 10, 8)]


@pytest.fixture
def patches(toy: Toy) -> torch.Tensor:
    count = sum(rows * columns for _, rows, columns in GRIDS)
    return torch.randn(count, toy.config.vision.patch_values, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_features_are_the_peers(toy: Toy, patches: torch.Tensor) -> None:
    ours = toy.model.see(patches, GRIDS)
    peer = toy.peer.model.visual(patches, grid_thw=torch.tensor(GRIDS))
    assert_close(ours.tokens_M_D, peer.pooler_output, rtol=0, atol=1e-4)
    for level, expected in zip(ours.deepstack_M_D, peer.deepstack_features, strict=True):
        assert_close(level, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("multiplications", [1, 30_000, 400_000])
def test_slices_are_the_whole(toy: Toy, patches: torch.Tensor, multiplications: int) -> None:
    """Slices smaller than a layer, and larger; pictures wear an adapter, or nothing."""
    tower, vision = toy.model.visual, toy.config.vision
    adapter = Adapter.new(toy.config, AdapterConfig(r=2, target_modules=("attn.qkv", "linear_fc1", "linear_fc2")), 1)
    for pair in adapter.pairs.values():
        pair.b_O_R.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    lora = AdapterBatch([Segment(adapter, 0, 24), Segment(adapter, 28, 108)])
    whole = toy.model.see(patches, GRIDS, lora)
    vision_pass = tower.start(patches, GRIDS, lora)
    with pytest.raises(ValueError, match="before block 0 of 4"):
        tower.finish(vision_pass)
    slices = 1
    while not tower.advance(vision_pass, multiplications):
        slices += 1
    sliced = tower.finish(vision_pass)
    assert_close(sliced.tokens_M_D, whole.tokens_M_D, rtol=0, atol=1e-5)
    assert_close(sliced.deepstack_M_D, whole.deepstack_M_D, rtol=0, atol=1e-5)
    linear = vision.depth * len(patches) * 2 * vision.hidden_size * (2 * vision.hidden_size + vision.intermediate_size)
    assert slices > linear / (2 * max(multiplications, 20_000))  # a piece has one row of merged patches at least


@torch.no_grad()
def test_no_slice_is_long(toy: Toy) -> None:
    """The multiplications of each, as the tower itself counts them, on a picture that dwarfs a slice."""
    tower = toy.model.visual
    patches = torch.zeros(40 * 40, toy.config.vision.patch_values)
    vision_pass = tower.start(patches, [(1, 40, 40)])
    assert not tower.advance(vision_pass, 2_000_000)
    assert vision_pass.slices is not None
    parts = list(vision_pass.slices)
    assert max(parts) <= 2_000_000
    assert sum(parts) > 100 * 2_000_000


@torch.no_grad()
def test_a_picture_does_not_see_its_neighbours(toy: Toy, patches: torch.Tensor) -> None:
    together = toy.model.see(patches, GRIDS)
    pieces = patches.split([rows * columns for _, rows, columns in GRIDS])
    alone = VisualFeatures.joined([toy.model.see(piece, [grid]) for piece, grid in zip(pieces, GRIDS, strict=True)])
    assert_close(together.tokens_M_D, alone.tokens_M_D, rtol=0, atol=1e-5)
    assert_close(together[6:7].deepstack_M_D[1], alone[6:7].deepstack_M_D[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(2, 4, 4), (1, 3, 4), (1, 4, 5), (1, 0, 4)])
def test_grids_that_cannot_be_merged_are_refused(toy: Toy, grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="one frame, and multiples of 2 patches"):
        toy.model.see(torch.zeros(16, toy.config.vision.patch_values), [grid])


def test_patches_that_the_grids_do_not_explain_are_refused(toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"shape \(15, 96\), the grids need \(16, 96\)"):
        toy.model.see(torch.zeros(15, 96), [(1, 4, 4)])
