"""Office documents: invoices, receipts and leave forms, Chinese and English, and what there is to say about them.

Owns their fields, layouts and answers. No document of this module is shown to the base in training.
"""

import dataclasses
import json
import random
from collections.abc import Callable

import numpy as np

from veneer_base import alphabet, pen, values
from veneer_base.faces import TRAINING_LATIN, TRAINING_WIDE, Face
from veneer_base.pages import ROW_PX

KINDS = ("invoice", "receipt", "leave")
LANGUAGES = ("zh", "en")
ANSWERS = ("sentence", "json")
LAYOUTS = ("list", "right", "indented")
HELD_OUT_LAYOUT = "columns"
SIZE_PX = (256, 192)

PROMPTS = {
    ("zh", "sentence"): "这是什么单据?",
    ("zh", "json"): "提取字段。",
    ("en", "sentence"): "What document is this?",
    ("en", "json"): "Extract the fields as JSON.",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """What a document says.

    Attributes:
        title: printed on top.
        rows: key and value as printed, from top to bottom.
        fields: what an answer in JSON holds, in order.
        sentence: the same as a sentence.
    """

    title: str
    rows: list[tuple[str, str]]
    fields: dict[str, str]
    sentence: str

    def answer(self, form: str) -> str:
        """The expected answer, as a `sentence` or as `json`."""
        return self.sentence if form == "sentence" else json.dumps(self.fields, ensure_ascii=False)


def _paid(r: random.Random) -> str:
    whole = r.randint(10, 10 ** r.choice((3, 4, 5)) - 1)
    return f"{whole:,}" + (f".{r.randint(0, 99):02d}" if r.random() < 0.5 else "")


def invoice_zh(r: random.Random) -> Document:
    """A Chinese invoice, with the tutorial's sentence."""
    title, amount, day, number = r.choice(alphabet.INVOICE_TYPES), _paid(r), values.day(r), values.digits(r, 8, 8)
    return Document(
        title,
        [
            (r.choice(("金额", "合计", "价税合计")), "¥" + amount),
            (r.choice(("开票日期", "日期")), day.chinese),
            (r.choice(("发票号码", "号码")), number),
            ("项目", r.choice(alphabet.ITEMS)),
            r.choice((("购买方", values.company(r)), ("税率", values.percentage(r)), ("开票人", values.person(r)))),
        ],
        {"类型": title, "金额": amount, "开票日期": day.chinese, "号码": number},
        f"这是一张金额为 ¥{amount} 的{title},开票日期是{day.chinese}。",
    )


def receipt_zh(r: random.Random) -> Document:
    """A Chinese receipt."""
    title, amount, day = r.choice(alphabet.RECEIPT_TYPES), _paid(r), values.day(r)
    payee, method = values.person(r), r.choice(alphabet.PAY_METHODS)
    return Document(
        title,
        [
            (r.choice(("金额", "实收", "合计")), "¥" + amount),
            ("日期", day.chinese),
            ("收款人", payee),
            ("付款方式", method),
            r.choice((("商品", r.choice(alphabet.ITEMS)), ("单号", values.digits(r, 6, 6)))),
        ],
        {"类型": title, "金额": amount, "收款人": payee, "付款方式": method, "日期": day.chinese},
        f"这是一张金额为 ¥{amount} 的{title},收款人是{payee},付款方式是{method},日期是{day.chinese}。",
    )


def leave_zh(r: random.Random) -> Document:
    """A Chinese leave form, with the tutorial's sentence."""
    name, department = values.person(r), r.choice(alphabet.DEPARTMENTS)
    leave, days = r.choice(alphabet.LEAVE_TYPES), str(r.randint(1, 15))
    return Document(
        r.choice(("请假单", "申请表", "审批单")),
        [
            (r.choice(("姓名", "申请人")), name),
            ("部门", department),
            (r.choice(("类型", "请假类型")), leave),
            ("天数", days + r.choice(("", "天"))),
            r.choice((("事由", r.choice(alphabet.LEAVE_REASONS)), ("开始日期", values.day(r).chinese))),
        ],
        {"姓名": name, "部门": department, "请假类型": leave, "天数": days},
        f"该申请表填写了姓名{name}、部门{department}、请假类型{leave}、天数{days}天。",
    )


def invoice_en(r: random.Random) -> Document:
    """An English invoice."""
    amount, day, number = _paid(r), values.day(r), values.digits(r, 6, 6)
    return Document(
        r.choice(("Invoice", "Tax Invoice")),
        [
            (r.choice(("Total", "Amount")), "$" + amount),
            ("Date", day.dashed),
            (r.choice(("Invoice No", "No")), number),
            ("Item", r.choice(alphabet.ITEMS_EN)),
            r.choice((("Company", r.choice(alphabet.COMPANIES_EN)), ("Rate", values.percentage(r)))),
        ],
        {"type": "Invoice", "amount": amount, "date": day.dashed, "number": number},
        f"This is an invoice for ${amount} dated {day.dashed}.",
    )


def receipt_en(r: random.Random) -> Document:
    """An English receipt."""
    amount, day, method = _paid(r), values.day(r), r.choice(alphabet.PAY_METHODS_EN)
    return Document(
        r.choice(("Receipt", "Sales Receipt")),
        [
            (r.choice(("Total", "Paid")), "$" + amount),
            ("Date", day.dashed),
            ("Method", method),
            ("Item", r.choice(alphabet.ITEMS_EN)),
            r.choice((("Receipt No", values.digits(r, 4, 4)), ("Change", "$" + values.digits(r, 2, 2)))),
        ],
        {"type": "Receipt", "amount": amount, "method": method, "date": day.dashed},
        f"This is a receipt for ${amount} paid by {method} on {day.dashed}.",
    )


def leave_en(r: random.Random) -> Document:
    """An English leave form."""
    name, department = values.person_en(r), r.choice(alphabet.DEPARTMENTS_EN)
    leave, days = r.choice(alphabet.LEAVE_TYPES_EN), str(r.randint(1, 15))
    return Document(
        "Leave Form",
        [
            ("Name", name),
            ("Department", department),
            ("Type", leave),
            ("Days", days),
            r.choice((("Start", values.day(r).dashed), ("Status", r.choice(("Open", "Yes"))))),
        ],
        {"name": name, "department": department, "leave": leave, "days": days},
        f"This leave form was filled in by {name} of {department}: {leave} leave, {days} days.",
    )


WRITERS: dict[tuple[str, str], Callable[[random.Random], Document]] = {
    ("invoice", "zh"): invoice_zh,
    ("receipt", "zh"): receipt_zh,
    ("leave", "zh"): leave_zh,
    ("invoice", "en"): invoice_en,
    ("receipt", "en"): receipt_en,
    ("leave", "en"): leave_en,
}


def draw(
    r: random.Random,
    document: Document,
    layout: str,
    wide: tuple[Face, ...] = TRAINING_WIDE,
    latin: tuple[Face, ...] = TRAINING_LATIN,
) -> np.ndarray:
    """The document as a picture, uint8 [192, 256, 3]: the title, and five rows in random order."""
    width, height = SIZE_PX
    ink_H_W = np.zeros((height, width), np.uint8)
    hand = pen.choose_hand(r, wide, latin, (18, 21))
    while max(pen.width_px(f"{key}: {value}", hand) for key, value in document.rows) > width - 12:
        hand = dataclasses.replace(hand, size_px=hand.size_px - 1)
    offset = r.uniform(-2, 2)
    separator = r.choice((":", "：", ": ")) if alphabet.is_wide(document.title[0]) else ": "
    title_px = pen.width_px(document.title, hand)
    title_x = {"list": (width - title_px) / 2, "right": 8.0, "indented": width - 10 - title_px}
    pen.write(ink_H_W, title_x.get(layout, (width - title_px) / 2), ROW_PX / 2 + offset, document.title, hand)
    margin = r.uniform(3, 12)
    column = r.uniform(0.4, 0.46) * width
    for i, (key, value) in enumerate(r.sample(document.rows, len(document.rows)), 1):
        middle = i * ROW_PX + ROW_PX / 2 + offset
        free = width - 3 - pen.width_px(value, hand)
        if layout in ("list", "indented"):
            text = key + separator + value
            x = margin if layout == "list" else margin + 18
            pen.write(ink_H_W, max(1.0, min(x, width - 2 - pen.width_px(text, hand))), middle, text, hand)
        else:
            x, _ = pen.write(ink_H_W, min(margin, 6.0), middle, key, hand)
            pen.write(
                ink_H_W, max(x + 4, free - margin / 2 if layout == "right" else min(column, free)), middle, value, hand
            )
    return pen.coloured(r, ink_H_W)
