"""Ready dataset folders of rendered office documents.

Owns the folder's layout: pictures under `images/`, and one JSONL file a split with rows of `image`, `text`, `prompt`
and `split`: by a file's name alone, `test_layout` would be a part of `test`. The splits `test_layout` and `test_font`
hold a layout and fonts that no other split has.
"""

import dataclasses
import json
import random
from pathlib import Path

from PIL import Image

from veneer_base import documents
from veneer_base.faces import HELD_OUT_LATIN, HELD_OUT_WIDE, TRAINING_LATIN, TRAINING_WIDE, Face


@dataclasses.dataclass(frozen=True)
class Split:
    """Which documents go into a file, and how many for each row of training."""

    name: str
    share: float
    layouts: tuple[str, ...] = documents.LAYOUTS
    wide: tuple[Face, ...] = TRAINING_WIDE
    latin: tuple[Face, ...] = TRAINING_LATIN


SPLITS = (
    Split("train", 1.0),
    Split("validation", 0.1),
    Split("test", 0.1),
    Split("test_layout", 0.1, (documents.HELD_OUT_LAYOUT,)),
    Split("test_font", 0.1, wide=HELD_OUT_WIDE, latin=HELD_OUT_LATIN),
)


def write_dataset(
    folder: Path,
    *,
    rows: int,
    kinds: tuple[str, ...] = documents.KINDS,
    languages: tuple[str, ...] = documents.LANGUAGES,
    answer: str = "sentence",
    seed: int = 0,
) -> dict[str, int]:
    """Writes a dataset, the same for the same arguments.

    Args:
        folder: to be made; an empty one will do.
        rows: of training; each other split has a tenth, and 20 at least.
        kinds: of `documents.KINDS`, in equal shares.
        languages: of `documents.LANGUAGES`, in equal shares.
        answer: `sentence` or `json`.
        seed: of every random choice.

    Returns:
        Rows by split.

    Raises:
        ValueError: an argument is not one of those listed.
        FileExistsError: the folder is not empty.
    """
    _check(kinds, documents.KINDS, "kind")
    _check(languages, documents.LANGUAGES, "language")
    _check((answer,), documents.ANSWERS, "answer")
    if rows < 1:
        raise ValueError(f"rows: at least 1, not {rows}")
    images = folder / "images"
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    images.mkdir(parents=True)
    return {
        split.name: _write_split(folder, split, rows, [(k, v) for k in kinds for v in languages], answer, seed)
        for split in SPLITS
    }


def _write_split(folder: Path, split: Split, rows: int, sorts: list[tuple[str, str]], answer: str, seed: int) -> int:
    count = rows if split.name == "train" else max(20, round(rows * split.share))
    r = random.Random(f"{seed}/{split.name}")
    with (folder / f"{split.name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for number in range(count):
            kind, language = sorts[number % len(sorts)]
            document = documents.WRITERS[kind, language](r)
            picture = documents.draw(r, document, r.choice(split.layouts), split.wide, split.latin)
            name = f"images/{split.name}_{kind}_{number + 1:05d}.png"
            Image.fromarray(picture).save(folder / name)
            prompt = documents.PROMPTS[language, answer]
            row = {"image": name, "text": document.answer(answer), "prompt": prompt, "split": split.name}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _check(given: tuple[str, ...], known: tuple[str, ...], what: str) -> None:
    for value in given:
        if value not in known:
            raise ValueError(f"{what} {value!r}: one of {', '.join(known)}")
