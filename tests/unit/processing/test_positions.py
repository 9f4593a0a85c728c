"""Positions equal those of transformers' Qwen3-VL."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from veneer_processing.positions import rope_positions

PAD, MERGE = 99, 2
MODEL = SimpleNamespace(
    config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=MERGE)),
    get_vision_position_ids=lambda *args, **kwargs: Qwen3VLModel.get_vision_position_ids(None, *args, **kwargs),
)


@given(
    runs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)), max_size=5),
    last=st.integers(0, 9),
)
def test_they_are_those_of_transformers(runs: list[tuple[int, int, int]], last: int) -> None:
    ids: list[int] = []
    grids = []
    for text, rows, columns in runs:
        ids += [1] * text + [PAD] * (rows * columns)
        grids.append((1, rows * MERGE, columns * MERGE))
    ids += [1] * last
    if not ids:
        return
    ids_T, grids_n_3 = np.array(ids), np.array(grids, np.int64).reshape(-1, 3)
    expected_3_B_T, delta_B_1 = Qwen3VLModel.get_rope_index(
        MODEL,
        torch.from_numpy(ids_T)[None],
        mm_token_type_ids=torch.from_numpy(ids_T == PAD).int()[None],
        image_grid_thw=torch.from_numpy(grids_n_3),
    )
    positions_3_T, delta = rope_positions(ids_T, grids_n_3, PAD, MERGE)
    np.testing.assert_array_equal(positions_3_T, expected_3_B_T[:, 0].numpy())
    assert delta == delta_B_1.item()


def test_pictures_side_by_side_stay_two() -> None:
    grids_n_3 = np.array([[1, 2, 4], [1, 2, 2]])
    positions_3_T, delta = rope_positions(np.array([PAD] * 3), grids_n_3, PAD, MERGE)
    assert positions_3_T.tolist() == [[0, 0, 2], [0, 0, 2], [0, 1, 2]]
    assert delta == 0


def test_decoding_goes_on_after_the_last_position() -> None:
    positions_3_T, delta = rope_positions(np.array([1, PAD, PAD, PAD, PAD, 1]), np.array([[1, 4, 4]]), PAD, MERGE)
    assert positions_3_T.max() + 1 == 6 + delta == 4


@pytest.mark.parametrize("pads", [0, 3, 5])
def test_grids_that_do_not_fit_the_ids_are_refused(pads: int) -> None:
    with pytest.raises(ValueError, match=f"{pads} visual tokens in the sequence, 4 in the grids"):
        rope_positions(np.array([1] + [PAD] * pads), np.array([[1, 4, 4]]), PAD, MERGE)
