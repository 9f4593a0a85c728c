"""Random bases are written shard by shard, are a function of the seed, and hold no tensor twice."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from veneer_base.random_weights import write_random_model


def matrices(directory: Path) -> dict[str, torch.Tensor]:
    model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16)
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}


def test_transformers_loads_every_shard_and_no_two_matrices_are_alike(tmp_path: Path) -> None:
    parameters = write_random_model("tiny", tmp_path / "a", shard_bytes=1_000_000)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    found = matrices(tmp_path / "a")
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "a")
    assert sum(p.numel() for p in model.parameters()) == parameters
    starts = {name: tuple(p.flatten()[:8].tolist()) for name, p in found.items()}
    assert len(set(starts.values())) == len(starts)


def test_the_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_model("tiny", tmp_path / name, seed=seed)
    a, b, c = (matrices(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape 'huge': one of qwen3-vl-2b, tiny"):
        write_random_model("huge", tmp_path / "a")
    (tmp_path / "x").touch()
    with pytest.raises(FileExistsError):
        write_random_model("tiny", tmp_path)
