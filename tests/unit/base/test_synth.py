"""The renderer writes whole, repeatable dataset folders, and trains in a loop that can be stopped."""

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from veneer_base.synth import SPLITS, write_dataset


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_a_folder_is_whole_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    counts = write_dataset(tmp_path / "a", rows=6)
    write_dataset(tmp_path / "b", rows=6)
    write_dataset(tmp_path / "c", rows=6, seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    assert set(counts) == {split.name for split in SPLITS}
    named = set()
    for split, count in counts.items():
        rows = [json.loads(line) for line in (tmp_path / "a" / f"{split}.jsonl").read_text("utf-8").splitlines()]
        assert len(rows) == count
        for row in rows:
            assert row["text"]
            assert row["prompt"]
            assert row["split"] == split
            named.add(row["image"])
            with Image.open(tmp_path / "a" / row["image"]) as picture:
                width, height = picture.size
            assert width % 32 == height % 32 == 0  # read as it is, without a resize
    assert named == {f"images/{path.name}" for path in (tmp_path / "a" / "images").iterdir()}


def test_values_of_the_test_split_are_not_those_of_training(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", rows=60, kinds=("invoice",))
    texts = {
        split: {
            json.loads(line)["text"] for line in (tmp_path / "a" / f"{split}.jsonl").read_text("utf-8").splitlines()
        }
        for split in ("train", "test")
    }
    assert not texts["train"] & texts["test"]


def test_json_answers_are_json(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", rows=6, answer="json")
    for line in (tmp_path / "a" / "train.jsonl").read_text("utf-8").splitlines():
        assert isinstance(json.loads(json.loads(line)["text"]), dict)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kind 'menu': one of invoice, receipt, leave"):
        write_dataset(tmp_path / "a", rows=1, kinds=("menu",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError):
        write_dataset(tmp_path / "full", rows=1)
