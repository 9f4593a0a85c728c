"""Packed adapters compute what segments of adapters compute."""

import pytest
import torch

from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig, Segment
from veneer_vlm.lora_pack import AdapterPack, PackedAdapterBatch

Q, K, V = (f"model.language_model.layers.0.self_attn.{name}_proj" for name in "qkv")
FC2 = "model.visual.merger.linear_fc2"


def adapter(config: ModelConfig, seed: int, rank: int, targets: tuple[str, ...]) -> Adapter:
    made = Adapter.new(config, AdapterConfig(r=rank, lora_alpha=3 * rank, target_modules=targets), seed)
    generator = torch.Generator().manual_seed(seed)
    for pair in made.pairs.values():
        pair.b_O_R.normal_(0, 0.5, generator=generator)
    return made


@pytest.fixture
def adapters(toy) -> list[Adapter]:  # noqa: ANN001
    config = toy.model.config
    return [
        adapter(config, 1, 4, ("q_proj", "v_proj")),
        adapter(config, 2, 8, ("k_proj", "v_proj", "merger.linear_fc2")),
        adapter(config, 3, 2, ("down_proj",)),
    ]


def worn(batch: list[int], adapters: list[Adapter]) -> PackedAdapterBatch:
    pack = AdapterPack(4, 8)
    place = pack.place(adapters)
    return PackedAdapterBatch(pack, torch.tensor([place[o] if o >= 0 else -1 for o in batch]))


def owned(batch: list[int], adapters: list[Adapter]) -> AdapterBatch:
    return AdapterBatch([Segment(adapters[o], t, t + 1) for t, o in enumerate(batch) if o >= 0])


def test_packed_is_what_segments_are(adapters: list[Adapter]) -> None:
    batch = [0, 1, -1, 1, 2, 0]
    generator = torch.Generator().manual_seed(5)
    hidden, output = torch.randn(6, 64, generator=generator), torch.randn(6, 128, generator=generator)
    columns = {Q: slice(0, 64), K: slice(64, 96), V: slice(96, 128)}
    packed = worn(batch, adapters)
    right = owned(batch, adapters).add(columns, hidden, output.clone())
    for _ in range(2):  # packed once, used again
        torch.testing.assert_close(packed.add(columns, hidden, output.clone()), right)


def test_what_nobody_adapts_is_left_alone(adapters: list[Adapter]) -> None:
    packed = worn([0], adapters[2:])
    found = packed.add({Q: slice(0, 64)}, torch.ones(1, 64), torch.ones(1, 64))
    assert torch.equal(found, torch.ones(1, 64))


def test_merged_rows_follow_their_adapters(adapters: list[Adapter]) -> None:
    packed = worn([1, 1, 1, 1, -1, -1, -1, -1, 0, 0, 0, 0], adapters).merged(4)
    columns = {FC2: slice(0, 64)}
    found = packed.add(columns, torch.ones(3, 128), torch.zeros(3, 64))
    right = owned([1, -1, -1], adapters).add(columns, torch.ones(3, 128), torch.zeros(3, 64))
    torch.testing.assert_close(found, right)
    assert found[0].any()
    assert not found[1:].any()


def test_an_adapter_that_overflows_reaches_no_other(adapters: list[Adapter]) -> None:
    adapters[0].pairs[Q].a_R_I.fill_(3e38)
    packed = worn([0, 1], adapters[:2])
    found = packed.add({Q: slice(0, 64)}, torch.ones(2, 64), torch.zeros(2, 64))
    assert not found[0].isfinite().all()
    assert not found[1].any()


def test_half_precision_outputs_are_rounded_once(adapters: list[Adapter]) -> None:
    batch, columns = [0, 1, 2], {Q: slice(0, 64)}
    hidden, output = torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    found = worn(batch, adapters).add(columns, hidden, output.clone())
    right = owned(batch, adapters).add(columns, hidden, output.clone())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, right)


def test_who_comes_takes_the_place_of_who_has_left_and_nobody_else_moves(adapters: list[Adapter]) -> None:
    pack, columns = AdapterPack(2, 8), {Q: slice(0, 64), K: slice(64, 96), V: slice(96, 128)}
    hidden, output = torch.randn(2, 64), torch.randn(2, 128)
    place: dict[int, int] = {}
    # The second brings a linear that nobody had; the last one less rank than who was there, and no K.
    for needed in ([0], [2, 0], [0, 1], [1, 0], [1, 2], [0, 1], [2, 0]):
        before, place = place, dict(zip(needed, pack.place([adapters[o] for o in needed]), strict=True))
        assert all(place[o] == before[o] for o in needed if o in before)
        batch = (needed * 2)[:2]
        packed = PackedAdapterBatch(pack, torch.tensor([place[o] for o in batch]))
        right = owned(batch, adapters).add(columns, hidden, output.clone())
        torch.testing.assert_close(packed.add(columns, hidden, output.clone()), right)


def test_an_adapter_that_was_released_is_written_anew(adapters: list[Adapter]) -> None:
    pack, columns = AdapterPack(2, 8), {Q: slice(0, 64)}
    hidden, output = torch.randn(1, 64), torch.randn(1, 64)
    for _ in range(2):
        packed = PackedAdapterBatch(pack, torch.tensor(pack.place(adapters[:1])))
        right = owned([0], adapters).add(columns, hidden, output.clone())
        torch.testing.assert_close(packed.add(columns, hidden, output.clone()), right)
        pack.release(adapters[0])
        adapters[0].pairs[Q].b_O_R.normal_()  # another adapter, for all that the pack knows


@pytest.mark.parametrize("astray", ["a_R_I", "b_O_R"])
def test_what_an_adapter_leaves_in_its_place_reaches_no_other(adapters: list[Adapter], astray: str) -> None:
    columns = {Q: slice(0, 64), K: slice(64, 96), V: slice(96, 128)}
    hidden, output = torch.randn(2, 64), torch.randn(2, 128)
    getattr(adapters[0].pairs[Q], astray).fill_(torch.nan)
    pack = AdapterPack(2, 8)
    for needed in ([0, 1], [2, 1]):  # the last one comes to where the first was, and has neither Q nor V
        packed = PackedAdapterBatch(pack, torch.tensor(pack.place([adapters[o] for o in needed])))
        found = packed.add(columns, hidden, output.clone())
    torch.testing.assert_close(found, owned([2, 1], adapters).add(columns, hidden, output.clone()))
