"""Setting text on a page: glyphs rendered once, then laid down as arrays.

Owns the glyph cache and the ink. It knows nothing of what the text means.
"""

import dataclasses
import functools
import random

import numpy as np
from PIL import ImageFont

from veneer_base.alphabet import CHARACTER_INDEX, is_wide
from veneer_base.faces import FACES, Face


@dataclasses.dataclass(frozen=True)
class Hand:
    """The faces and the size that a text is set in.

    Attributes:
        wide: name of the face for Chinese.
        latin: name of the face for everything else.
        size_px: the em in pixels.
    """

    wide: str
    latin: str
    size_px: int

    def face_of(self, character: str) -> str:
        """The name of the face that a character is set in."""
        return self.wide if is_wide(character) else self.latin


@dataclasses.dataclass(frozen=True)
class Glyph:
    """A rendered character: its ink, where the ink lies relative to the pen on the baseline, how far the pen moves."""

    ink_H_W: np.ndarray
    left_px: int
    top_px: int
    advance_px: float


# Where each character of a page was put: x and y of its middle in pixels, and its index in the alphabet.
Spot = tuple[float, float, int]

# Middle of a line of text above its baseline, as a share of the em.
MIDDLE = 0.38


@functools.cache
def _font(face: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FACES[face].path), size_px, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def glyph(face: str, size_px: int, character: str) -> Glyph:
    """A character in a face; rendered on first use."""
    font = _font(face, size_px)
    mask, (left, top) = font.getmask2(character, mode="L", anchor="ls")
    ink_H_W = np.asarray(mask, np.uint8).reshape(mask.size[1], mask.size[0])
    return Glyph(ink_H_W, left, top, font.getlength(character))


def choose_hand(r: random.Random, wide: tuple[Face, ...], latin: tuple[Face, ...], sizes_px: tuple[int, int]) -> Hand:
    """A random hand: the Chinese face's own Latin at times, else one of the Latin faces."""
    face = r.choice(wide)
    other = face if face.latin and r.random() < 0.4 else r.choice(latin)
    return Hand(face.name, other.name, r.randint(*sizes_px))


def width_px(text: str, hand: Hand) -> float:
    """How far a text moves the pen."""
    return sum(glyph(hand.face_of(c), hand.size_px, c).advance_px for c in text)


def write(page_H_W: np.ndarray, x: float, middle_y: float, text: str, hand: Hand) -> tuple[float, list[Spot]]:
    """Sets a text with its line's middle at `middle_y`; ink outside the page is cut off.

    Returns:
        Where the pen stands after it, and the spots of its visible characters.
    """
    height, width = page_H_W.shape
    baseline = round(middle_y + MIDDLE * hand.size_px)
    spots = []
    for character in text:
        g = glyph(hand.face_of(character), hand.size_px, character)
        if character != " ":
            left, top = round(x) + g.left_px, baseline + g.top_px
            x0, y0 = max(left, 0), max(top, 0)
            x1, y1 = min(left + g.ink_H_W.shape[1], width), min(top + g.ink_H_W.shape[0], height)
            if x0 < x1 and y0 < y1:
                patch = page_H_W[y0:y1, x0:x1]
                np.maximum(patch, g.ink_H_W[y0 - top : y1 - top, x0 - left : x1 - left], out=patch)
            spots.append((x + g.advance_px / 2, middle_y, CHARACTER_INDEX[character]))
        x += g.advance_px
    return x, spots


def coloured(r: random.Random, page_H_W: np.ndarray) -> np.ndarray:
    """The page as a picture, uint8 [H, W, 3]: dark ink on light paper, at times tinted, at times grainy."""
    paper, ink = np.full(3, 255.0), np.full(3, r.uniform(0, 60))
    if r.random() < 0.5:
        paper = np.array([r.uniform(205, 255) for _ in range(3)])
        ink = np.array([r.uniform(0, 110) for _ in range(3)])
    shade_H_W_1 = page_H_W[..., None].astype(np.float32) / 255
    picture = paper + (ink - paper).astype(np.float32) * shade_H_W_1
    if r.random() < 0.25:
        grain = np.random.default_rng(r.getrandbits(32)).standard_normal(page_H_W.shape, np.float32)
        picture += grain[..., None] * r.uniform(2, 9)
    clipped: np.ndarray = np.clip(picture, 0, 255).astype(np.uint8)
    return clipped
