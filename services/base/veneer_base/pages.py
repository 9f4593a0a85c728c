"""Pages of printed lines, as the base is trained on them.

Owns the lines and where they stand. Office documents with a meaning are `documents`.
"""

import dataclasses
import random

import numpy as np

from veneer_base import alphabet, pen, values
from veneer_base.faces import TRAINING_LATIN, TRAINING_WIDE, Face

ROW_PX = 32


@dataclasses.dataclass(frozen=True)
class Placement:
    """How pages are laid out.

    Attributes:
        sizes_px: smallest and largest em.
        jitter_px: how far rows stand off the middle of the rows of visual tokens, at most, all together.
        loose: share of pages whose rows ignore the grid altogether: any start, any pitch.
        keyed: share of lines that are a key and a value.
        most_rows: rows at most.
    """

    sizes_px: tuple[int, int] = (18, 22)
    jitter_px: float = 2.0
    loose: float = 0.0
    keyed: float = 0.5
    most_rows: int = 6


@dataclasses.dataclass(frozen=True)
class Line:
    """A printed line. `text` is what stands there; a plain line has no key."""

    key: str
    value: str
    text: str
    day: values.Day | None = None


@dataclasses.dataclass(frozen=True)
class Page:
    """Ink (uint8 [H, W], 255 is black), the lines from top to bottom, and where each line's characters are."""

    ink_H_W: np.ndarray
    lines: list[Line]
    spots: list[list[pen.Spot]]


_DATE_KEYS = {"日期", "开票日期", "开始日期", "结束日期", "时间", "Date", "Start", "End"}
_MONEY_KEYS = {
    "金额", "合计", "总计", "税额", "单价", "余额", "押金", "实收", "应收", "找零",
    "价税合计", "交易金额", "退款", "定金",
    "Total", "Amount", "Tax", "Price", "Balance", "Due", "Paid", "Fee", "Change", "Net",
}  # fmt: skip
_NUMBER_KEYS = {
    "号码", "数量", "编号", "订单号", "单号", "账号", "税号", "电话", "发票号码", "天数",
    "No", "Qty", "Order", "Code", "Account", "Phone", "Invoice No", "Receipt No", "Days",
}  # fmt: skip


def plain_value(r: random.Random) -> str:
    """The text of a line without a key."""
    kind = r.choices(range(8), (16, 14, 16, 6, 14, 18, 8, 8))[0]
    if kind == 0:
        return values.money(r)
    if kind == 1:
        return values.date(r)
    if kind == 2:
        return values.digits(r, 1, 8 if r.random() < 0.8 else 11)
    if kind == 3:
        return values.code(r)
    if kind == 4:
        return values.hanzi(r, 1, 5)
    if kind == 5:
        return values.words_zh(r)
    if kind == 6:
        return r.choice((values.person, values.company))(r)
    return values.words_en(r)


def keyed_line(r: random.Random) -> Line:
    """A key with a value that suits it, most of the time; else any value, so that keys do not give values away."""
    chinese = r.random() < 0.72
    key = r.choice(alphabet.KEYS_ZH if chinese else alphabet.KEYS_EN)
    separator = r.choices((":", "：", ": ", " "), (45, 30, 15, 10) if chinese else (20, 0, 60, 20))[0]
    day = None
    if r.random() < 0.12:
        value = plain_value(r)
    elif key in _DATE_KEYS:
        day = values.day(r)
        value = r.choices(
            (day.chinese, day.dashed, day.slashed, day.dotted), (45, 35, 12, 8) if chinese else (0, 60, 25, 15)
        )[0]
    elif key in _MONEY_KEYS:
        value = values.money(r)
    elif key in _NUMBER_KEYS:
        value = values.code(r) if r.random() < 0.2 else values.digits(r, 1, 8)
    elif key in ("税率", "Rate"):
        value = values.percentage(r)
    elif chinese:
        value = r.choice((values.person, values.words_zh, values.words_zh, values.company))(r)
    else:
        value = r.choice((values.person_en, values.words_en))(r)
    return Line(key, value, key + separator + value, day)


def line(r: random.Random, keyed: float) -> Line:
    """A random line."""
    if r.random() < keyed:
        return keyed_line(r)
    text = plain_value(r)
    return Line("", text, text)


def compose(
    r: random.Random,
    height: int,
    width: int,
    placement: Placement,
    wide: tuple[Face, ...] = TRAINING_WIDE,
    latin: tuple[Face, ...] = TRAINING_LATIN,
) -> Page:
    """A random page of `height` by `width` pixels."""
    ink_H_W = np.zeros((height, width), np.uint8)
    hand = pen.choose_hand(r, wide, latin, placement.sizes_px)
    margin = r.uniform(2, 14)
    lines: list[Line] = []
    spots: list[list[pen.Spot]] = []
    column = r.uniform(0.35, 0.5) * width if r.random() < 0.15 else 0.0
    for middle in _row_middles(r, height, placement, hand.size_px):
        row_hand = hand if r.random() < 0.85 else dataclasses.replace(hand, size_px=r.randint(*placement.sizes_px))
        row = _fitting_line(r, row_hand, placement.keyed, width - 6)
        if row is None:
            continue
        spots.append(_set(r, ink_H_W, row, row_hand, margin, column, middle))
        lines.append(row)
    if not lines:  # nothing fitted on the only row that was kept: an empty page asks nothing
        return compose(r, height, width, placement, wide, latin)
    return Page(ink_H_W, lines, spots)


def _row_middles(r: random.Random, height: int, placement: Placement, size_px: int) -> list[float]:
    if r.random() < placement.loose:
        pitch = r.uniform(max(1.25 * size_px, 26), 40)
        start = r.uniform(0.65 * size_px, 0.65 * size_px + 16)
        middles = [start + i * pitch for i in range(16) if start + i * pitch < height - 0.6 * size_px]
    else:
        offset = r.uniform(-placement.jitter_px, placement.jitter_px)
        middles = [i * ROW_PX + ROW_PX / 2 + offset + r.uniform(-1, 1) for i in range(height // ROW_PX)]
        # Whole pages keep their ink: a row that a large offset would cut is left out.
        middles = [m for m in middles if 0.5 * size_px < m < height - 0.5 * size_px]
    middles = middles or [height / 2]
    kept = [m for m in middles if r.random() < 0.92] or middles[:1]
    return kept[: placement.most_rows]


def _fitting_line(r: random.Random, hand: pen.Hand, keyed: float, room_px: float) -> Line | None:
    for _ in range(12):
        candidate = line(r, keyed)
        if pen.width_px(candidate.text, hand) <= room_px:
            return candidate
    short = Line("", *(2 * (values.digits(r, 1, 4),)))
    return short if pen.width_px(short.text, hand) <= room_px else None


def _set(
    r: random.Random, ink_H_W: np.ndarray, row: Line, hand: pen.Hand, margin: float, column: float, middle: float
) -> list[pen.Spot]:
    width = ink_H_W.shape[1]
    if row.key and (column or r.random() < 0.2):
        label = row.text[: len(row.text) - len(row.value)].rstrip()
        value_px = pen.width_px(row.value, hand)
        free = width - 3 - value_px
        x, spots = pen.write(ink_H_W, min(margin, 6.0), middle, label, hand)
        target = column if column else free - r.uniform(0, 8)
        if x + 4 <= free:
            _, more = pen.write(ink_H_W, min(max(target, x + 4), free), middle, row.value, hand)
            return spots + more
        _, more = pen.write(ink_H_W, x, middle, row.value, hand)
        return spots + more
    free = width - 3 - pen.width_px(row.text, hand)
    x = margin if r.random() < 0.7 else r.uniform(1, max(2, free))
    _, spots = pen.write(ink_H_W, max(1.0, min(x, free)), middle, row.text, hand)
    return spots
