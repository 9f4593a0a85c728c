"""The demonstration's data and recipes. Owns what is learned; not how it is run.

Handwriting is scikit-learn's digits: real scans of 8×8 pixels. Documents are drawn, with random values; the
test split's own values are in no training row.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from veneer.trainer.v1.model_pb2 import DTYPE_FLOAT32
from veneer.trainer.v1.training_job_pb2 import LoraSpec, OptimizerSpec, TrainingSpec

SEED = 20_260
TEST_DIGITS = 360
VALIDATION_DIGITS = 100
DIGIT_PX = 64  # the least that the base does not enlarge by itself: four visual tokens
TRAIN_DOCUMENTS = 1000
VALIDATION_DOCUMENTS = 50
TEST_DOCUMENTS = 200
DIGIT_QUESTION = "Which digit is this? Answer with one digit from 0 to 9."
_OWN_VALUES = ("金额", "号码", "姓名", "收款人")
"""Fields with so many values that a test row can have one of its own."""

Row = tuple[Image.Image, str, str]
"""A picture, a question that states the answer's form, and the answer."""


@dataclass(frozen=True)
class Scene:
    """A part of the demonstration.

    Attributes:
        title: for people.
        name: of its dataset and its adapter.
        metric: what is measured on the test split.
        measured: what people call that.
        rows: draws a split's rows.
        recipe: how the adapter is trained.
        least: what the adapter must reach.
        most_of_base_error: the greatest share of the base's error that may be left; None where none is set.
    """

    title: str
    name: str
    metric: str
    measured: str
    rows: Callable[[], dict[str, list[Row]]]
    recipe: TrainingSpec
    least: float
    most_of_base_error: float | None = None


def write(scene: Scene, folder: Path) -> dict[str, list[Row]]:
    """Writes a scene as a folder to push, and returns its rows."""
    splits = scene.rows()
    for split, rows in splits.items():
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for number, (picture, question, answer) in enumerate(rows):
            path = f"images/{split}/{number:04d}.png"
            picture.save(folder / path)
            lines.append(json.dumps({"image": path, "prompt": question, "text": answer}, ensure_ascii=False))
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return splits


def digits() -> dict[str, list[Row]]:
    """All 1,797 digits: the same test split on every machine."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # it has no stubs

    found = load_digits()
    order = list(range(len(found.images)))
    random.Random(SEED).shuffle(order)  # noqa: S311  # a choice to repeat, no secret
    rows = [_digit(found.images[index], int(found.target[index])) for index in order]
    first, second = TEST_DIGITS, TEST_DIGITS + VALIDATION_DIGITS
    return {"test": rows[:first], "validation": rows[first:second], "train": rows[second:]}


def _digit(ink_8_8: object, label: int) -> Row:
    import numpy as np

    grey = np.asarray(ink_8_8, np.float32) * (255 / 16)
    picture = Image.fromarray((255 - grey).astype(np.uint8)).resize((DIGIT_PX, DIGIT_PX), Image.Resampling.BICUBIC)
    return picture.convert("RGB"), DIGIT_QUESTION, str(label)


def documents() -> dict[str, list[Row]]:
    """Chinese invoices, receipts and leave forms; the test split's own values occur nowhere else."""
    r = random.Random(SEED)  # noqa: S311  # as above
    seen: set[tuple[str, str]] = set()
    drawn = _documents(r)
    learned = []
    for _ in range(TRAIN_DOCUMENTS + VALIDATION_DOCUMENTS):
        fields, row = next(drawn)
        seen |= _own_values(fields)
        learned.append(row)
    test: list[Row] = []
    while len(test) < TEST_DOCUMENTS:
        fields, row = next(drawn)
        if not seen & _own_values(fields):
            test.append(row)
    return {"test": test, "validation": learned[TRAIN_DOCUMENTS:], "train": learned[:TRAIN_DOCUMENTS]}


def _documents(r: random.Random) -> Iterator[tuple[dict[str, str], Row]]:
    from veneer_base import documents as synth

    while True:
        kind = r.choice(synth.KINDS)
        document = synth.WRITERS[kind, "zh"](r)
        picture = Image.fromarray(synth.draw(r, document, r.choice(synth.LAYOUTS)))
        question = f"用JSON回答:{'、'.join(document.fields)}。"
        yield document.fields, (picture, question, document.answer("json"))


def _own_values(fields: dict[str, str]) -> set[tuple[str, str]]:
    return {(name, fields[name]) for name in _OWN_VALUES if name in fields}


# What docs/base.md recommends for the demonstration base, which is small enough to be trained in every linear.
RECIPE = TrainingSpec(
    epochs=4,
    lora=LoraSpec(rank=16, alpha=32, dropout=0, target_modules=["decoder+merger+vision"]),
    optimizer=OptimizerSpec(learning_rate=2e-3),
    batch_size=16,
    gradient_accumulation=1,
    dtype=DTYPE_FLOAT32,  # so small a base gains nothing from bf16
)

HANDWRITING = Scene(
    title="handwriting",
    name="digits",
    metric="exact_match",
    measured="exact match",
    rows=digits,
    recipe=RECIPE,
    least=0.92,
    most_of_base_error=0.25,
)
DOCUMENTS = Scene(
    title="office documents",
    name="documents",
    metric="field_match",
    measured="fields",
    rows=documents,
    recipe=RECIPE,
    least=0.87,
)
SCENES = (HANDWRITING, DOCUMENTS)
