"""The curriculum: what the base sees, stage by stage, and how fast it learns there.

Owns the numbers. They are steps, not minutes: the same steps give the same weights on any machine.
"""

import dataclasses

from veneer_base.pages import Placement


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: of the stage, in logs and checkpoints.
        steps: optimiser steps.
        rates: learning rate at the stage's start and end; it falls along a half cosine.
        sizes_px: heights and widths of its pictures, one drawn for each batch.
        visual_tokens: in a batch, about.
        fewest_pictures: in a batch, whatever their size.
        first_placement: of the text at the start of the stage.
        last_placement: and at its end; numbers in between move linearly.
        spelling_weight: of the discarded head's loss.
        order_weight: of the discarded head's second loss: at which character of its line each visual token begins.
        decodes: whether the decoder takes part.
        tower_learns: whether the answers' loss reaches the tower.
        transcribed: share of pictures that are read whole.
        questions: short questions for each picture.
        warmup_steps: of the learning rate.
    """

    name: str
    steps: int
    rates: tuple[float, float]
    sizes_px: tuple[tuple[int, int], ...]
    visual_tokens: int
    first_placement: Placement
    last_placement: Placement
    fewest_pictures: int = 8
    spelling_weight: float = 1.0
    order_weight: float = 0.0
    decodes: bool = True
    tower_learns: bool = True
    transcribed: float = 1.0
    questions: int = 0
    warmup_steps: int = 50

    def pictures(self, height: int, width: int) -> int:
        """How many pictures of a size make a batch."""
        return max(self.fewest_pictures, self.visual_tokens * 1024 // (height * width))

    def placement(self, step: int) -> Placement:
        """Where text stands at a step."""
        share = step / max(1, self.steps - 1)
        first, last = self.first_placement, self.last_placement
        return dataclasses.replace(
            last,
            jitter_px=first.jitter_px + share * (last.jitter_px - first.jitter_px),
            loose=first.loose + share * (last.loose - first.loose),
        )


_LINES = ((32, 128), (32, 160), (32, 192))
_BLOCKS = ((32, 192), (64, 192), (64, 256), (96, 192))
_PAGES = ((192, 256), (192, 256), (96, 256), (128, 192), (64, 256))

STAGES = (
    Stage(
        name="spelling",
        steps=4000,
        rates=(2e-3, 1.5e-3),
        sizes_px=((64, 192), (96, 256), (64, 128)),
        visual_tokens=320,
        first_placement=Placement(jitter_px=1),
        last_placement=Placement((17, 23), jitter_px=5, loose=0.15),
        decodes=False,
    ),
    Stage(
        name="lines",
        steps=2400,
        rates=(2e-3, 1.7e-3),
        sizes_px=_LINES,
        visual_tokens=130,
        first_placement=Placement(jitter_px=2),
        last_placement=Placement(jitter_px=4),
        spelling_weight=0.3,
        order_weight=0.5,
        tower_learns=False,
    ),
    Stage(
        name="blocks",
        steps=3000,
        rates=(1.8e-3, 1.5e-3),
        sizes_px=_BLOCKS,
        visual_tokens=200,
        first_placement=Placement(jitter_px=3),
        last_placement=Placement((17, 23), jitter_px=4, loose=0.05),
        spelling_weight=0.4,
        order_weight=0.5,
        transcribed=0.85,
        questions=1,
    ),
    Stage(
        name="pages",
        steps=4000,
        rates=(1.6e-3, 2e-5),
        sizes_px=_PAGES,
        visual_tokens=300,
        first_placement=Placement((17, 23), jitter_px=4, loose=0.05),
        last_placement=Placement((17, 23), jitter_px=4, loose=0.1, keyed=0.6),
        spelling_weight=0.4,
        order_weight=0.3,
        transcribed=0.5,
        questions=3,
    ),
)
