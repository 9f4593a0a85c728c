"""How well the base reads: the tables of `docs/base.md`.

Owns the test sets, which are a function of their names, and the scores. Every value is drawn at random, so that what is
read was not seen; faces are those of training or the ones held out.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration

from veneer_base import alphabet, pages, pen, reading, tasks, values
from veneer_base.faces import HELD_OUT_LATIN, HELD_OUT_WIDE, TRAINING_LATIN, TRAINING_WIDE, Face
from veneer_base.shape import PATCH_PX
from veneer_base.unfold import FULL_VOCABULARY_SIZE
from veneer_base.vocabulary import CompactVocabulary

_BATCH = 48


@dataclasses.dataclass(frozen=True)
class Setting:
    """Which faces, and whether lines keep to the grid of visual tokens."""

    name: str
    wide: tuple[Face, ...] = TRAINING_WIDE
    latin: tuple[Face, ...] = TRAINING_LATIN
    loose: bool = False


SETTINGS = (
    Setting("seen fonts"),
    *(Setting(f"held-out font {face.name}", (face,), HELD_OUT_LATIN) for face in HELD_OUT_WIDE),
    Setting("off the grid", loose=True),
)


def _key_and_value(r: random.Random) -> str:
    return r.choice(alphabet.KEYS_ZH) + ":" + r.choice((values.money, values.date))(r)


LINES: dict[str, Callable[[random.Random], str]] = {
    "digits 1-4": lambda r: values.digits(r, 1, 4),
    "digits 5-8": lambda r: values.digits(r, 5, 8),
    "money": values.money,
    "dates": values.date,
    "Chinese key and value": _key_and_value,
    "Chinese words": lambda r: r.choice(alphabet.WORDS_ZH),
    "Chinese characters 1-2": lambda r: values.hanzi(r, 1, 2),
    "Chinese characters 3-5": lambda r: values.hanzi(r, 3, 5),
    "English words": lambda r: r.choice(alphabet.WORDS_EN),
}


class Reader:
    """Asks a model about pictures, greedily.

    Args:
        model: Qwen3-VL in either form.
        vocabulary: the model's.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: CompactVocabulary) -> None:
        model.eval()  # type: ignore[no-untyped-call]  # transformers gives it no types
        self._model, self._vocabulary = model, vocabulary
        self._end, self._pad = (vocabulary.encode(token)[0] for token in ("<|im_end|>", "<|endoftext|>"))

    @classmethod
    def of_directory(cls, directory: Path) -> "Reader":
        """A reader over an unfolded base, or any Qwen3-VL directory with Qwen's vocabulary."""
        model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return cls(model, CompactVocabulary(tokenizer, list(range(FULL_VOCABULARY_SIZE))))

    @torch.no_grad()
    def read(self, pictures: Sequence[np.ndarray], prompt: str, longest: int) -> list[str]:
        """The answers to one prompt about pictures of one size, each at most `longest` tokens."""
        answers: list[str] = []
        for i in range(0, len(pictures), _BATCH):
            answers += self._read_batch(np.stack(pictures[i : i + _BATCH]), prompt, longest)
        return answers

    def _read_batch(self, pictures_B_H_W_3: np.ndarray, prompt: str, longest: int) -> list[str]:
        B, H, W, _ = pictures_B_H_W_3.shape
        pads = "<|image_pad|>" * (H * W // reading.CELL_PX**2)
        text = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids_B_L = torch.tensor([self._vocabulary.encode(text)]).expand(B, -1)
        patches_B_N_P = reading.patches(pictures_B_H_W_3)
        moments = (
            patches_B_N_P.view(-1, 3, 1, PATCH_PX**2).expand(-1, -1, 2, -1).reshape(-1, 2 * patches_B_N_P.shape[-1])
        )
        output_B_T = self._model.generate(  # type: ignore[operator]  # transformers types it as a tensor
            input_ids=ids_B_L,
            attention_mask=torch.ones_like(ids_B_L),
            pixel_values=moments,
            image_grid_thw=torch.tensor([[1, H // PATCH_PX, W // PATCH_PX]] * B),
            mm_token_type_ids=(ids_B_L == self._model.config.image_token_id).long(),
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=self._end,
            pad_token_id=self._pad,
        )
        return [self._vocabulary.decode(row[ids_B_L.shape[1] :].tolist()) for row in output_B_T]


def line_picture(r: random.Random, text: str, setting: Setting, height: int = 64, width: int = 256) -> np.ndarray:
    """One line in a picture of its own."""
    hand = pen.choose_hand(r, setting.wide, setting.latin, (18, 22))
    while (room := width - 6 - pen.width_px(text, hand)) < 0:
        hand = dataclasses.replace(hand, size_px=hand.size_px - 1)
    ink_H_W = np.zeros((height, width), np.uint8)
    row = r.randrange(height // pages.ROW_PX)
    middle = (row + 0.5) * pages.ROW_PX + r.uniform(-2, 2)
    if setting.loose:
        middle = r.uniform(0.65 * hand.size_px, height - 0.65 * hand.size_px)
    pen.write(ink_H_W, r.uniform(2, 2 + room), middle, text, hand)
    return pen.coloured(r, ink_H_W)


def line_scores(reader: Reader, setting: Setting, count: int) -> dict[str, float]:
    """Share of single lines that are read exactly, by kind."""
    scores = {}
    for name, draw in LINES.items():
        r = random.Random(f"{setting.name}/{name}")
        texts = [draw(r) for _ in range(count)]
        answers = reader.read([line_picture(r, text, setting) for text in texts], tasks.TRANSCRIBE[0], 24)
        scores[name] = _share(answers, texts)
    return scores


def page_scores(reader: Reader, setting: Setting, count: int) -> dict[str, float]:
    """Pages of 256x192 with up to six rows: share of pages and of lines read exactly, and of questions answered so."""
    r = random.Random(setting.name)
    placement = pages.Placement(loose=float(setting.loose))
    some = [pages.compose(r, 192, 256, placement, setting.wide, setting.latin) for _ in range(count)]
    pictures = [pen.coloured(r, page.ink_H_W) for page in some]
    answers = reader.read(pictures, tasks.TRANSCRIBE[0], 140)
    wanted = ["\n".join(line.text for line in page.lines) for page in some]
    lines = [
        read == line
        for answer, text in zip(answers, wanted, strict=True)
        for read, line in zip((answer.split("\n") + [""] * 8), text.split("\n"), strict=False)
    ]
    values_right, values_asked = [], []
    for page, picture in zip(some, pictures, strict=True):
        keyed = [line for line in page.lines if line.key and sum(line.key == other.key for other in page.lines) == 1]
        if keyed:
            line = keyed[0]
            prompts = tasks.VALUE_OF if alphabet.is_wide(line.key[0]) else tasks.VALUE_OF_EN
            values_asked.append(line.value)
            values_right += reader.read([picture], prompts[0].format(key=line.key), 24)
    return {
        "whole pages": _share(answers, wanted),
        "lines of pages": sum(lines) / len(lines),
        "value of a key": _share(values_right, values_asked),
    }


def scores(reader: Reader, count: int) -> dict[str, dict[str, float]]:
    """Shares by setting and by what is read, each over `count` examples."""
    return {s.name: {**line_scores(reader, s, count), **page_scores(reader, s, count)} for s in SETTINGS}


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The same as Markdown, a column for each setting."""
    columns = list(found.values())
    head = "| read exactly | " + " | ".join(found) + " |\n|---|" + "---|" * len(columns)
    rows = [f"| {name} | " + " | ".join(f"{column[name]:.2f}" for column in columns) + " |" for name in columns[0]]
    return "\n".join([head, *rows])


def _share(answers: Sequence[str], texts: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(answers, texts, strict=True)) / len(texts)
