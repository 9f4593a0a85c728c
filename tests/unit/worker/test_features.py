"""Features kept on disk: the same bits, for whom they were made, and not under other weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer_trainer.worker.loop.batches import Batches, Pass
from veneer_trainer.worker.loop.feature_files import FeatureFiles, depends_on, key_of, tower_digest
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_vlm.vision import VisualFeatures

Bench = Other = Any  # the fixture's class in conftest.py; what a run may have otherwise
ROOM = 1 << 30


def kept(bench: Bench, folder: Path, memory_bytes: int = ROOM, **other: Other) -> FrozenFeatures:
    """Features as a run keeps them, or those of a run that differs in one thing."""
    numerics = bench.plan().numerics(1) | other.get("numerics", {})
    tower, contract = other.get("tower", bench.model.visual), other.get("contract", bench.processor.contract.digest)
    about = depends_on(tower, other.get("tenant", "acme"), contract, numerics)
    return FrozenFeatures(bench.model, memory_bytes, FeatureFiles(folder, ROOM), about)


def one_pass(bench: Bench, features: FrozenFeatures) -> Pass:
    (only,) = Batches(bench.processor, bench.plan(), features.known).step(bench.rows()).passes
    return only


def made(bytes_each: int) -> VisualFeatures:
    return VisualFeatures(torch.ones(bytes_each // 8), (torch.zeros(bytes_each // 8),))


def forbid_the_tower(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    def seen(*_: object) -> VisualFeatures:
        raise AssertionError("a picture went through the tower")

    monkeypatch.setattr(bench.model, "see", seen)


@pytest.mark.parametrize("memory_bytes", [0, ROOM])
def test_losses_are_equal_to_the_bit_with_features_of_an_earlier_run(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    first = kept(bench, tmp_path)
    fresh = first.of(one_pass(bench, first).pictures)
    again = kept(bench, tmp_path, memory_bytes)
    reused = one_pass(bench, again)
    assert [picture.patches_P_X for picture in reused.pictures] == [None] * 4
    forbid_the_tower(monkeypatch, bench)
    stored = again.of(reused.pictures)
    assert fresh is not None
    assert stored is not None
    assert torch.equal(fresh.tokens_M_D, stored.tokens_M_D)
    assert len(fresh.deepstack_M_D) == len(stored.deepstack_M_D) == 1
    assert torch.equal(fresh.deepstack_M_D[0], stored.deepstack_M_D[0])
    run, rerun = bench.run(), bench.run()
    run.learner.features, rerun.learner.features = first, again
    for each in (run, rerun):
        steps = [Batches(bench.processor, each.plan, each.learner.features.known).step(bench.rows())]
        each.learner.learn(steps[0], 1e-2)
        each.learner.learn(steps[0], 1e-2)
    assert run.state.figures.loss == rerun.state.figures.loss
    assert all(torch.equal(run.weights()[name], tensor) for name, tensor in rerun.weights().items())


def test_nothing_else_hits(bench: Bench, tmp_path: Path) -> None:
    first = kept(bench, tmp_path)
    first.of(one_pass(bench, first).pictures)
    sha256 = bench.row(0).pictures[0].sha256
    assert kept(bench, tmp_path).known(sha256) is not None
    assert kept(bench, tmp_path).known("0" * 64) is None
    tower = copy.deepcopy(bench.model.visual)
    tower.merger.linear_fc1.weight.data[0, 0] += 1
    differences: dict[str, Other] = {
        "tenant": "another", "contract": "0" * 64, "tower": tower, "numerics": {"dtype": "bfloat16"},
    }  # fmt: skip
    for name, value in differences.items():
        assert kept(bench, tmp_path, **{name: value}).known(sha256) is None, name
    assert kept(bench, tmp_path, numerics={"threads": "2"}).known(sha256) is None


@pytest.mark.parametrize("weight", ["merger.linear_fc2.weight", "blocks.1.attn.qkv.bias", "pos_embed.weight"])
def test_another_weight_has_another_digest(bench: Bench, weight: str) -> None:
    tower = copy.deepcopy(bench.model.visual)
    assert tower_digest(tower) == tower_digest(bench.model.visual)
    tower.get_parameter(weight).data.view(-1)[0] += 1
    assert tower_digest(tower) != tower_digest(bench.model.visual)
    assert tower_digest(bench.model.visual.to(torch.float32)) != tower_digest(tower.to(torch.bfloat16))


def test_a_damaged_file_is_dropped(tmp_path: Path) -> None:
    FeatureFiles(tmp_path, ROOM).put("a", made(800))
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert FeatureFiles(tmp_path, ROOM).get("a") is None
    assert not list(tmp_path.iterdir())


def test_the_folder_is_bounded_and_the_longest_unused_goes(tmp_path: Path) -> None:
    FeatureFiles(tmp_path, ROOM).put("probe", made(8000))
    size_bytes = next(tmp_path.iterdir()).stat().st_size
    files = FeatureFiles(tmp_path, 3 * size_bytes)
    for key in ("a", "b", "c", "d"):
        files.put(key, made(8000))
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "b", "c"}  # this run's stay; the probe went
    later = FeatureFiles(tmp_path, 3 * size_bytes)
    assert later.get("a") is not None
    later.put("e", made(8000))
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c", "e"}


def test_a_disk_that_takes_nothing_more_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FeatureFiles(tmp_path, ROOM)
    files.put("a", made(800))

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    files.put("b", made(800))
    assert files.get("b") is None
    assert files.get("a") is not None
    assert {path.stem for path in tmp_path.iterdir()} == {"a"}


def test_a_trained_tower_has_no_kept_features(bench: Bench) -> None:
    run = bench.run(lora={"target_modules": ["decoder+merger"]})
    assert run.features is None


def test_keys_tell_their_parts_apart() -> None:
    assert key_of({"a": "b", "c": "d"}, "e") == key_of({"c": "d", "a": "b"}, "e")
    assert key_of({"a": "b"}, "e") != key_of({"a": "be"}, "")
