"""Batches for the training loop: rendered pictures, token ids, labels, and where each character is.

Owns how pages and questions become arrays. A batch is a function of the seed, the stage and the step alone, so that
a resumed run goes on with the same data.
"""

import dataclasses
import random

import numpy as np

from veneer_base import pages, pen, tasks
from veneer_base.reading import CELL_PX, PREFIX_BEFORE
from veneer_base.stages import Stage
from veneer_base.vocabulary import CompactVocabulary

NO_LABEL = -100
BINS = 8  # a visual token's width, in parts that hold one character's middle at most


@dataclasses.dataclass(frozen=True)
class Batch:
    """B equal pictures and the questions about them.

    Attributes:
        pictures_B_H_W_3: uint8.
        ids_B_L: compact ids, padded on the right.
        labels_B_L: the token that each position must predict, `NO_LABEL` where none.
        segments_B_L: 0 for the prefix, 1, 2, ... for the questions, -1 for padding.
        spots_K_5: picture, visual token, bin, character and number in its line of each printed character.
    """

    pictures_B_H_W_3: np.ndarray
    ids_B_L: np.ndarray
    labels_B_L: np.ndarray
    segments_B_L: np.ndarray
    spots_K_5: np.ndarray


class Composer:
    """Makes batches.

    Args:
        vocabulary: the compact one.
        seed: of the whole run.
    """

    def __init__(self, vocabulary: CompactVocabulary, seed: int) -> None:
        self._seed = seed
        self._pad = vocabulary.encode("<|endoftext|>")[0]
        self._picture = vocabulary.encode("<|image_pad|>")[0]
        self._before = vocabulary.encode("<|im_start|>user\n<|vision_start|>")
        self._after = vocabulary.encode("<|vision_end|>")
        self._vocabulary = vocabulary
        if len(self._before) != PREFIX_BEFORE:
            raise ValueError(f"the prefix before a picture is {len(self._before)} tokens, not {PREFIX_BEFORE}")

    def compose(self, stage: Stage, step: int, share: int = 0, shares: int = 1) -> Batch:
        """The batch of a stage's step, or one process's share of it."""
        height, width = random.Random(f"{self._seed}/{stage.name}/{step}").choice(stage.sizes_px)
        r = random.Random(f"{self._seed}/{stage.name}/{step}/{share}")
        placement = stage.placement(step)
        pictures, rows, spots = [], [], []
        for b in range(-(-stage.pictures(height, width) // shares)):
            page = pages.compose(r, height, width, placement)
            pictures.append(pen.coloured(r, page.ink_H_W))
            spots += [(b, *spot) for spot in cell_spots(page, height, width)]
            if stage.decodes:
                asked = tasks.questions(r, page, stage.questions)
                if r.random() < stage.transcribed or not asked:
                    asked.append(tasks.transcription(r, page))
                rows.append(self.row(asked, height * width // CELL_PX**2))
        ids, labels, segments = self._padded(rows)
        return Batch(np.stack(pictures), ids, labels, segments, np.array(spots, np.int64).reshape(-1, 5))

    def row(self, asked: list[tasks.Question], visual_tokens: int) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels and segments of one picture with its questions."""
        ids = [*self._before, *[self._picture] * visual_tokens, *self._after]
        labels, segments = [NO_LABEL] * len(ids), [0] * len(ids)
        for number, question in enumerate(asked, 1):
            prompt = self._vocabulary.encode(f"{question.prompt}<|im_end|>\n<|im_start|>assistant\n")
            answer = self._vocabulary.encode(f"{question.answer}<|im_end|>")
            ids += prompt + answer
            labels += [NO_LABEL] * (len(prompt) - 1) + answer + [NO_LABEL]
            segments += [number] * (len(prompt) + len(answer))
        return ids, labels, segments

    def _padded(self, rows: list[tuple[list[int], list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        longest = max((len(row[0]) for row in rows), default=0)
        columns = [np.full((len(rows), longest), fill, np.int64) for fill in (self._pad, NO_LABEL, -1)]
        for i, row in enumerate(rows):
            for column, values in zip(columns, row, strict=True):
                column[i, : len(values)] = values
        return columns[0], columns[1], columns[2]


def cell_spots(page: pages.Page, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Visual token, bin, character and number in its line of each character whose middle is in the picture."""
    columns = width // CELL_PX
    return [
        (int(y) // CELL_PX * columns + int(x) // CELL_PX, int(x % CELL_PX * BINS / CELL_PX), character, number)
        for line in page.spots
        for number, (x, y, character) in enumerate(line)
        if 0 <= x < width and 0 <= y < height
    ]
