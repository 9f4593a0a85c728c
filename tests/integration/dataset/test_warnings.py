"""Each warning about accepted rows, as a live server gives it: with its place, and the row kept."""

import base64
import io
import uuid

import numpy as np
import pytest
from PIL import Image

from veneer.dataset.v1 import dataset_pb2
from veneer.dataset.v1 import dataset_service_pb2 as pb

from .conftest import Service, freeze, lines, png


@pytest.fixture
def dataset(service: Service) -> str:
    name = f"w{uuid.uuid4().hex[:12]}"
    service.stub().CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    return name


def photograph(kind: str, width: int = 160, height: int = 128, **options: object) -> bytes:
    """A picture with something in it, as a perceptual hash wants it."""
    noise = np.random.default_rng(5).integers(0, 255, (6, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(out, kind, **options)
    return out.getvalue()


def test_pictures_twice_nearly_twice_in_two_splits_and_unused(service: Service, dataset: str) -> None:
    pictures = {
        "a.png": photograph("PNG"),
        "copy.png": photograph("PNG"),
        "nearly.jpg": photograph("JPEG", quality=60),
        "icon.png": photograph("PNG", 64, 64),  # too small to be called alike
        "other.png": png(9, 160, 120),
        "thin.png": png(10, 900, 30),
        "unused.png": png(11),
    }
    rows = [
        {"image": "a.png", "text": "first"},
        {"image": "copy.png", "text": "second"},
        {"image": "nearly.jpg", "text": "third"},
        {"image": "other.png", "text": "fourth"},
        {"image": "other.png", "text": "fifth", "split": "test"},
        {"image": "thin.png", "text": "sixth"},
        {"image": "icon.png", "text": "seventh"},
        {"image": f"data:image/png;base64,{base64.b64encode(photograph('PNG', 320, 256)).decode()}", "text": "eighth"},
    ]
    result = freeze(service.stub(), dataset, lines(*rows), pictures)
    assert result.version.report.accepted_rows == len(rows)
    placed = sorted((each.code, each.path, each.line, each.json_path) for each in result.findings)
    assert placed == [
        ("PICTURE_EXTREME", "train.jsonl", 6, "$.image"),
        ("PICTURE_IN_TWO_SPLITS", "train.jsonl", 5, "$.image"),
        ("PICTURE_NEARLY_TWICE", "train.jsonl", 3, "$.image"),
        ("PICTURE_NEARLY_TWICE", "train.jsonl", 8, "$.image"),
        ("PICTURE_TWICE", "train.jsonl", 2, "$.image"),
        ("PICTURE_UNUSED", "unused.png", 0, ""),
    ]
    assert {each.severity for each in result.findings} == {dataset_pb2.SEVERITY_WARNING}
    found = {each.code: each.found for each in result.findings}
    assert found["PICTURE_NEARLY_TWICE"] == "looks like a.png"
    assert found["PICTURE_TWICE"] == "the same file as a.png"
    assert found["PICTURE_IN_TWO_SPLITS"] == "in train and in test"


def texts(*answers: str) -> list[dict[str, str]]:
    return [{"prompt": f"q{number}", "text": answer} for number, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("rows", "codes"),
    [
        (texts(*["same"] * 8), {"ANSWERS_CONSTANT"}),
        (texts(*["yes"] * 40, *["no"] * 2), {"ANSWERS_IMBALANCED"}),
        (texts(*["一张发票"] * 4, "an invoice", "a form", "a table", "a letter"), {"LANGUAGES_MIXED"}),
        (texts("x" * 8001, " "), {"ANSWER_VERY_LONG", "ANSWER_BLANK"}),
        (texts("请提取图中文字:欢迎来到人工智能时代", "一张发票"), {"INSTRUCTION_IN_TEXT"}),
        ([*texts("a", "b"), *texts("a")], {"ROW_TWICE"}),
        (
            [*texts("a"), {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}],
            {"DIALECT_MIXED"},
        ),
        ([{"prompt": "q", "text": "a", "note": "x"}], {"FIELD_UNREAD"}),
    ],
    ids=lambda value: ",".join(sorted(value)) if isinstance(value, set) else "",
)
def test_rows(service: Service, dataset: str, rows: list[dict[str, str]], codes: set[str]) -> None:
    result = freeze(service.stub(), dataset, lines(*rows))
    assert set(result.codes) == codes
    assert result.version.report.accepted_rows == len(rows)
    assert all(each.expected and each.remedy for each in result.findings)
    assert {each.code for each in result.version.report.finding_counts} == codes


def test_a_row_near_the_context_and_one_over_it(service: Service, dataset: str) -> None:
    sizes = [10, 1950, 2100]  # tokens, more or less; the model's context is 2048
    rows = [{"prompt": "p", "text": "a " * size} for size in sizes]
    result = freeze(service.stub(), dataset, lines(*rows), model="models/tiny")
    assert [(each.code, each.line) for each in result.findings] == [("ROW_NEAR_CONTEXT", 2), ("ROW_OVER_CONTEXT", 3)]
    assert result.version.report.accepted_rows == 2
