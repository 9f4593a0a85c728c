from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from veneer_vlm.cache import CachedAttention, CacheFullError, KeyValueCache

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Row, Toy

EXACT = {"rtol": 0, "atol": 1e-4}
CAPACITY = 40


def run(toy: Toy, rows: list[Row], plan: list[list[tuple[int, int]]]) -> list[torch.Tensor]:
    """Each row's logits, when pass by pass `plan` says how many more tokens of which row (= slot) are fed."""
    cache = KeyValueCache(toy.config.text, len(rows), CAPACITY, torch.float32, "cpu")
    logits = [[] for _ in rows]
    features = [toy.model.see(row.patches_P_X, row.grids) if row.grids else None for row in rows]
    for chunks in plan:
        ids, positions, visual = [], [], []
        for slot, tokens in chunks:
            row, start = rows[slot], cache.lengths[slot]
            ids.append(row.ids_T[start : start + tokens])
            positions.append(toy.positions(row)[:, start : start + tokens])
            if features[slot] is not None:
                seen = int((row.ids_T[:start] == toy.config.image_token_id).sum())
                here = int((ids[-1] == toy.config.image_token_id).sum())
                visual.append(features[slot][seen : seen + here])
        attention = CachedAttention(cache, chunks)
        joined = visual[0].joined(visual) if visual else None
        hidden = toy.model(torch.cat(ids), torch.cat(positions, dim=1), attention, joined)
        attention.commit()
        for (slot, tokens), part in zip(chunks, hidden.split([n for _, n in chunks]), strict=True):
            assert len(part) == tokens
            logits[slot].append(toy.model.logits(part))
    return [torch.cat(parts) for parts in logits]


@torch.no_grad()
def test_prefill_at_one_go_is_the_full_forward(toy: Toy, rows: list[Row]) -> None:
    plan = [[(slot, len(row.ids_T)) for slot, row in enumerate(rows)]]
    for cached, full in zip(run(toy, rows, plan), toy.logits(rows), strict=True):
        assert_close(cached, full, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
def test_chunks_of_prompts_and_single_tokens_are_the_full_forward(toy: Toy, rows: list[Row], size: int) -> None:
    longest = max(len(row.ids_T) for row in rows)
    plan = [
        [(slot, min(size, len(row.ids_T) - start)) for slot, row in enumerate(rows) if start < len(row.ids_T)]
        for start in range(0, longest, size)
    ]
    for cached, full in zip(run(toy, rows, plan), toy.logits(rows), strict=True):
        assert_close(cached, full, **EXACT)


@settings(max_examples=25)
@given(data=st.data())
def test_any_chunks_of_any_sequences_are_the_full_forward(toy: Toy, rows: list[Row], data: st.DataObject) -> None:
    """Chunks cut pictures too, and prefill of some rows shares passes with single tokens of others."""
    left = [len(row.ids_T) for row in rows]
    plan = []
    while any(left):
        slots = data.draw(st.lists(st.sampled_from([s for s, n in enumerate(left) if n]), min_size=1, unique=True))
        chunks = [(slot, data.draw(st.integers(1, left[slot]))) for slot in slots]
        for slot, tokens in chunks:
            left[slot] -= tokens
        plan.append(chunks)
    with torch.no_grad():
        for cached, full in zip(run(toy, rows, plan), toy.logits(rows), strict=True):
            assert_close(cached, full, **EXACT)


def test_a_slot_refuses_what_it_cannot_hold(toy: Toy) -> None:
    cache = KeyValueCache(toy.config.text, 2, CAPACITY, torch.float32, "cpu")
    cache.lengths[1] = 39
    CachedAttention(cache, [(0, 40), (1, 1)])
    with pytest.raises(CacheFullError, match="slot 1 holds 39 tokens of 40, 2 more do not fit"):
        CachedAttention(cache, [(0, 1), (1, 2)])
    with pytest.raises(ValueError, match="one chunk a pass"):
        CachedAttention(cache, [(0, 1), (0, 1)])


@torch.no_grad()
def test_a_pass_that_is_not_committed_leaves_no_trace(toy: Toy, rows: list[Row]) -> None:
    row = rows[0]
    cache = KeyValueCache(toy.config.text, 1, CAPACITY, torch.float32, "cpu")
    for ids in (row.ids_T.flip(0), row.ids_T):  # the first is thrown away
        attention = CachedAttention(cache, [(0, len(ids))])
        hidden = toy.model(ids, toy.positions(row), attention)
    attention.commit()
    assert_close(toy.model.logits(hidden), toy.logits([row])[0], **EXACT)
    assert cache.lengths == [len(row.ids_T)]
    # Keys and values, 3 layers, 1 slot, 40 tokens, 2 heads of 16, 4 bytes each.
    assert cache.size_bytes == 2 * 3 * 1 * 40 * 2 * 16 * 4
