from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from veneer_vlm.attention import PackedAttention
from veneer_vlm.generation import generate
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig
from veneer_vlm.vision import VisualFeatures

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Row, Toy


def features(toy: Toy, row: Row) -> VisualFeatures | None:
    return toy.model.see(row.patches_P_X, row.grids) if row.grids else None


def test_greedy_answers_are_the_peers(toy: Toy, rows: list[Row]) -> None:
    for row in rows:
        expected = toy.peer.generate(
            **toy.peer_arguments(row),
            attention_mask=torch.ones_like(row.ids_T[None]),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )[0, len(row.ids_T) :]
        answer = generate(toy.model, row.ids_T, toy.positions(row), max_tokens=8, visual=features(toy, row))
        assert list(answer) == expected.tolist()


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(toy: Toy, rows: list[Row]) -> None:
    row = rows[0]
    answer = list(generate(toy.model, row.ids_T, toy.positions(row), max_tokens=6))
    assert len(answer) == 6
    stop = answer[3]
    stopped = generate(toy.model, row.ids_T, toy.positions(row), max_tokens=6, stop_ids={stop})
    assert list(stopped) == answer[: answer.index(stop)]


def test_an_adapter_is_worn_in_prefill_and_in_every_step(toy: Toy, rows: list[Row]) -> None:
    row = rows[1]
    adapter = Adapter.new(toy.config, AdapterConfig(r=4, target_modules=("q_proj", "down_proj")), seed=0)
    for pair in adapter.pairs.values():
        pair.b_O_R.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    visual = features(toy, row)
    answer = list(generate(toy.model, row.ids_T, toy.positions(row), max_tokens=5, visual=visual, adapter=adapter))
    assert answer != list(generate(toy.model, row.ids_T, toy.positions(row), max_tokens=5, visual=visual))

    ids, positions = row.ids_T, toy.positions(row)
    for token in answer:  # the same by whole forward passes, without a cache
        lora = AdapterBatch.uniform(adapter, len(ids))
        hidden = toy.model(ids, positions, PackedAttention([len(ids)]), visual, lora)
        assert token == int(toy.model.logits(hidden[-1:]).argmax())
        ids = torch.cat([ids, torch.tensor([token])])
        positions = torch.cat([positions, (positions.max() + 1).expand(3, 1)], dim=1)
