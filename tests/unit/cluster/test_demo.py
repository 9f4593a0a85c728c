"""The demonstration's data and its verdicts; the whole of it is run by `make demo`."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from veneer_cluster.demo import __main__ as demo
from veneer_cluster.demo import full, scenes
from veneer_cluster.demo.play import Result, missed
from veneer_cluster.demo.scenes import DOCUMENTS, HANDWRITING


def test_digits_are_split_once_and_for_all() -> None:
    splits = scenes.digits()
    assert {split: len(rows) for split, rows in splits.items()} == {
        "test": 360,
        "validation": 100,
        "train": 1337,
    }
    pictures = [picture.tobytes() for rows in splits.values() for picture, _, _ in rows]
    assert len(pictures) == 1797
    again = scenes.digits()["test"]
    assert [answer for _, _, answer in splits["test"]] == [answer for _, _, answer in again]
    assert {answer for _, _, answer in splits["test"]} == set("0123456789")


def test_documents_of_the_test_split_have_values_of_their_own() -> None:
    splits = scenes.documents()
    assert {split: len(rows) for split, rows in splits.items()} == {
        "test": 200,
        "validation": 50,
        "train": 1000,
    }
    learned = [json.loads(answer) for split in ("train", "validation") for _, _, answer in splits[split]]
    seen = {(name, fields[name]) for fields in learned for name in scenes._OWN_VALUES if name in fields}
    for _, question, answer in splits["test"]:
        fields = json.loads(answer)
        assert not {(name, fields[name]) for name in scenes._OWN_VALUES if name in fields} & seen
        assert question == f"用JSON回答:{'、'.join(fields)}。"


def test_a_scene_becomes_a_folder_to_push(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64))
    scene = dataclasses.replace(HANDWRITING, rows=lambda: {"test": [(picture, "哪个?", "7")]})
    scenes.write(scene, tmp_path)
    (line,) = (tmp_path / "test.jsonl").read_text("utf-8").splitlines()
    row = json.loads(line)
    assert (row["prompt"], row["text"]) == ("哪个?", "7")
    with Image.open(tmp_path / row["image"]) as written:
        assert written.size == (64, 64)


def test_the_tutorial_s_folder_is_as_the_tutorial_has_it(tmp_path: Path) -> None:
    full.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text("utf-8").splitlines()]
    assert [row["image"] for row in rows] == ["invoice_01.png", "table_02.jpg", "form_03.png"]
    assert all((tmp_path / "images" / row["image"]).is_file() for row in rows)


@pytest.mark.parametrize(
    ("base", "adapter", "problems"),
    [(0.11, 0.953, 0), (0.11, 0.91, 1), (0.80, 0.93, 1), (0.80, 0.90, 2), (0.80, 0.95, 0), (1.0, 1.0, 0)],
)
def test_handwriting_must_reach_both_of_its_marks(base: float, adapter: float, problems: int) -> None:
    assert len(missed(HANDWRITING, base, adapter, HANDWRITING.least)) == problems


def test_documents_must_reach_what_is_documented(tmp_path: Path) -> None:
    page = tmp_path / "base.md"
    assert demo.documented_figure(page) is None
    page.write_text("# The base\n\n| Office documents, LoRA r 16 | 94.5 % |\n")
    assert demo.documented_figure(page) == pytest.approx(0.945)
    assert missed(DOCUMENTS, 0.04, 0.90, 0.945 - 0.03) != ()
    assert missed(DOCUMENTS, 0.04, 0.92, 0.945 - 0.03) == ()


def test_the_last_line_of_a_scene() -> None:
    figures = (0.114, (0.09, 0.15), 0.953, (0.93, 0.97), 360, 74.2, 90.0)
    result = Result("handwriting", "exact_match", *figures, "", "", "", 0.92, (), "exact match")
    assert result.line() == "handwriting: held-out exact match: base 11.4 % -> adapter 95.3 % (360 images, 74 s)"
