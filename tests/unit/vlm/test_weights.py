from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from veneer_vlm import weights
from veneer_vlm.attention import PackedAttention
from veneer_vlm.errors import WeightsError
from veneer_vlm.weights import load, locate, stored_tensors

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Toy


@pytest.fixture
def directory(toy_directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy_directory, tmp_path / "model")


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the single file: a tensor replaces one of its name (dots as __), None removes it."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for key, tensor in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if tensor is not None:
            tensors[key.replace("__", ".")] = tensor
    save_file(tensors, path)


def shard(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = list(load_file(path).items())
    path.unlink()
    weight_map = {}
    for number, part in enumerate((tensors[::2], tensors[1::2])):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(dict(part), directory / name)
        weight_map |= dict.fromkeys(dict(part), name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_load_like_one_file(toy: Toy, directory: Path) -> None:
    shard(directory)
    for name, slot in load(directory).slots().items():
        assert torch.equal(slot, toy.model.slots()[name])


def test_bfloat16_rounds_every_tensor_once(toy: Toy, directory: Path) -> None:
    for name, slot in load(directory, torch.bfloat16).slots().items():
        assert torch.equal(slot, toy.model.slots()[name].bfloat16())


def test_large_weights_stay_as_they_are_stored_and_say_the_same(
    toy: Toy, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    monkeypatch.setattr("veneer_vlm.model.LARGE", 1000)
    kept, widened = load(directory, as_stored=True), load(directory)
    dtypes = {name: slot.dtype for name, slot in kept.slots().items()}
    narrow = {name.split(".")[-2] for name, dtype in dtypes.items() if dtype is torch.bfloat16}
    assert narrow >= {"q_proj", "down_proj", "embed_tokens", "linear_fc1", "qkv"}
    assert all(dtype is torch.float32 for name, dtype in dtypes.items() if "norm" in name or "pos_embed" in name)
    assert kept.dtype is widened.dtype is torch.float32
    row = toy.row(0, (5, 4), [(4, 6)])
    outputs = []
    for model in (kept, widened):
        visual = model.see(row.patches_P_X, row.grids)
        hidden_T_D = model(row.ids_T, toy.positions(row), PackedAttention([len(row.ids_T)]), visual)
        outputs.append(model.logits(hidden_T_D))
    assert_close(*outputs)
    assert load(directory, torch.bfloat16, as_stored=True).lm_head.weight.dtype is torch.bfloat16
    save_file(load_file(path) | {"model.language_model.norm.weight": torch.ones(toy.config.text.hidden_size)}, path)
    assert load(directory, as_stored=True).lm_head.weight.dtype is torch.float32  # of several dtypes: nothing is kept


def test_everything_wrong_is_listed_at_once(directory: Path) -> None:
    rewrite(
        directory,
        lm_head__weight=None,
        model__language_model__norm__weight=torch.ones(63),
        model__visual__pos_embed__weight=torch.ones(25, 32, dtype=torch.int64),
        model__extra=torch.ones(1),
    )
    with pytest.raises(WeightsError) as error:
        load(directory)
    assert sorted(error.value.violations) == [
        "tensor lm_head.weight is missing",
        "tensor model.extra is unknown",
        "tensor model.language_model.norm.weight has shape (63,), (64,) is needed",
        "tensor model.visual.pos_embed.weight is torch.int64, a float is needed",
    ]


def test_a_long_list_is_cut_in_the_message_only(directory: Path) -> None:
    rewrite(directory, **{f"extra{number}": torch.ones(1) for number in range(30)})
    with pytest.raises(WeightsError, match="and 10 more") as error:
        load(directory)
    assert len(error.value.violations) == 30


def test_a_stored_copy_of_a_tied_head_must_agree(tied_toy: Toy, tmp_path: Path) -> None:
    tied_toy.peer.save_pretrained(tmp_path)
    head = tied_toy.peer.lm_head.weight.clone()
    rewrite(tmp_path, lm_head__weight=head)
    assert_close(load(tmp_path).lm_head.weight.data, head)
    rewrite(tmp_path, lm_head__weight=head[:3])
    with pytest.raises(WeightsError, match=r"lm_head.weight has shape \(3, "):
        load(tmp_path)
    rewrite(tmp_path, lm_head__weight=head + 1)
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from the embedding"):
        load(tmp_path)


def test_pickle_is_not_read(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing"):
        load(directory)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x80\x04K\x01."])
def test_a_broken_file_is_named(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read"):
        load(directory)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index of shards"),
        ("{}", "is no index of shards"),
        ('{"weight_map": 3}', "is no index of shards"),
        ('{"weight_map": {"a": 3}}', "is no index of shards"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"'\.\./model\.safetensors' is no file beside it"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"b\.safetensors is missing"),
    ],
)
def test_a_broken_index_is_named(directory: Path, index: str, message: str) -> None:
    shutil.copy(directory / "model.safetensors", directory.parent)
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=message):
        load(directory)


def test_a_reference_is_a_directory_or_a_hub_id(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(directory)) == directory
    with pytest.raises(WeightsError, match="neither a directory nor a hub id"):
        locate("/no/such/place")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for reference in ("Qwen/Nowhere", "../nowhere"):
        with pytest.raises(WeightsError, match=f"run `hf download {re.escape(reference)}`"):
            locate(reference)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_tower_that_is_mapped_says_the_same(directory: Path, stored: torch.dtype) -> None:
    path = directory / "model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path)
    shard(directory)
    mapped, copied = load(directory, as_stored=True, tower_mapped=True), load(directory, as_stored=True)
    assert len(mapped.mapped) == (sum(1 for _ in mapped.visual.parameters()) if stored is torch.float32 else 0)
    assert not copied.mapped
    assert_close(mapped.slots(), copied.slots(), rtol=0, atol=0)
    mapped.let_go_of_tower()
    assert_close(mapped.slots(), copied.slots(), rtol=0, atol=0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, which tells what is mapped")
def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path: Path) -> None:
    save_file({f"t{number}": torch.ones(1 << 18) for number in range(64)}, tmp_path / "model.safetensors")

    def mapped_bytes() -> int:
        (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("RssFile:"))
        return int(line.split()[1]) * 1024

    before, most, count = mapped_bytes(), 0, 0
    for _, tensor in stored_tensors(tmp_path):
        count += int(tensor.sum()) >> 18
        most = max(most, mapped_bytes() - before)
    assert count == 64
    assert most < 32 << 20, "of 64 MiB"


def test_a_tensor_may_come_in_pieces(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(directory).slots()
    monkeypatch.setattr(weights, "_MAPPED_BYTES", 1000)  # a few rows of most, no row of some
    assert_close(load(directory).slots(), whole, rtol=0, atol=0)
