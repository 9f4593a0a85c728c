"""A job's curves as a picture: panels of lines over steps, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[float, float]]

_WIDTH, _PANEL = 1000, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 24, 40, 36
_SCALE = 2  # drawn so much larger, then made smaller: smooth lines
_INK, _GRID, _PAPER = "#222222", "#dddddd", "#ffffff"
_TICKS = 4
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Line:
    """One course of values; single points are marked where `marked`."""

    name: str
    points: Points
    colour: str
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    """A chart with its own axis of values."""

    title: str
    lines: Sequence[Line] = field(default_factory=tuple)


def draw(panels: Sequence[Panel]) -> Image.Image:
    """Draws panels one below another over the same steps; those without points are left out."""
    filled = [panel for panel in panels if any(line.points for line in panel.lines)]
    steps = [step for panel in filled for line in panel.lines for step, _ in line.points]
    picture = Image.new("RGB", (_WIDTH * _SCALE, max(len(filled), 1) * _PANEL * _SCALE), _PAPER)
    for index, panel in enumerate(filled):
        _Axes(picture, panel, index * _PANEL, (min(steps), max(steps))).draw()
    return picture.resize((_WIDTH, picture.height // _SCALE), Image.Resampling.LANCZOS)


def ticks(low: float, high: float) -> list[float]:
    """Returns round values within a range, about four of them."""
    rough = (high - low) / _TICKS
    if rough <= 0:
        return [low]
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in _STEPS if unit * factor >= rough * 0.999)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """One panel on the picture; positions in pixels of the small picture."""

    def __init__(self, picture: Image.Image, panel: Panel, top: int, steps: tuple[float, float]) -> None:
        self._pen = ImageDraw.Draw(picture)
        self._font = ImageFont.load_default(13 * _SCALE)
        self._panel = panel
        self._top = top
        self._steps = steps
        values = [value for line in panel.lines for _, value in line.points]
        low, high = min(values), max(values)
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        self._values = (low - margin, high + margin)

    def draw(self) -> None:
        for value in ticks(*self._values):
            y = self._y(value)
            self._stroke([(_LEFT, y), (_WIDTH - _RIGHT, y)], _GRID, 1)
            self._write(_LEFT - 8, y, f"{value:.4g}", "rm")
        for step in ticks(*self._steps):
            x = self._x(step)
            self._stroke([(x, self._top + _PANEL - _BOTTOM), (x, self._top + _PANEL - _BOTTOM + 5)], _INK, 1)
            self._write(x, self._top + _PANEL - _BOTTOM + 16, f"{step:.6g}", "mm")
        self._write(_LEFT, self._top + 20, self._panel.title, "lm")
        right: float = _WIDTH - _RIGHT
        for line in reversed([line for line in self._panel.lines if line.points]):
            self._write(right, self._top + 20, line.name, "rm", line.colour)
            right -= self._pen.textlength(line.name, self._font) / _SCALE + 20
        for line in self._panel.lines:
            places = [(self._x(step), self._y(value)) for step, value in line.points]
            self._stroke(places, line.colour, 2)
            for x, y in places if line.marked or len(places) == 1 else ():
                self._pen.ellipse([_SCALE * each for each in (x - 3, y - 3, x + 3, y + 3)], fill=line.colour)

    def _x(self, step: float) -> float:
        first, last = self._steps
        return _LEFT + (step - first) / ((last - first) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def _y(self, value: float) -> float:
        low, high = self._values
        return self._top + _PANEL - _BOTTOM - (value - low) / (high - low) * (_PANEL - _TOP - _BOTTOM)

    def _stroke(self, places: Points, colour: str, width: int) -> None:
        self._pen.line([(x * _SCALE, y * _SCALE) for x, y in places], fill=colour, width=width * _SCALE, joint="curve")

    def _write(self, x: float, y: float, text: str, anchor: str, colour: str = _INK) -> None:
        self._pen.text((x * _SCALE, y * _SCALE), text, fill=colour, font=self._font, anchor=anchor)
