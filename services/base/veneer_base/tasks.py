"""Questions about a page, and their answers.

Owns the prompts the base is trained on. Each question stands alone: no answer may be copied from another one.
"""

import dataclasses
import json
import random

from veneer_base import alphabet
from veneer_base.pages import Line, Page

TRANSCRIBE = ("读出图中的文字。", "请提取图中文字。", "图中写了什么?", "Read the text.", "Transcribe the image.")
READ_LINE = ("第{n}行是什么?", "读出第{n}行。", "Read line {n}.")
VALUE_OF = ("{key}是什么?", "{key}?", "请读出{key}。", "{key}是多少?")
VALUE_OF_EN = ("What is the {key}?", "{key}?", "Read the {key}.")
VALUE_IN_SENTENCE = "用一句话回答:{key}是什么?"
VALUES_OF = "读出{keys}。"
VALUES_AS_JSON = ("用JSON回答:{keys}。", "提取字段:{keys}。")
FIELDS_AS_JSON = ("提取字段。", "Extract the fields as JSON.")
DAY_OF = "{key}是哪一天?"
COUNT_LINES = ("图中有几行文字?", "How many lines are there?")
REPEAT = "复述:"


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and the answer to learn."""

    prompt: str
    answer: str


def transcription(r: random.Random, page: Page) -> Question:
    """All lines from top to bottom."""
    return Question(r.choice(TRANSCRIBE), "\n".join(line.text for line in page.lines))


def questions(r: random.Random, page: Page, count: int) -> list[Question]:
    """`count` short questions."""
    keyed = [line for line in page.lines if line.key and sum(line.key == other.key for other in page.lines) == 1]
    return [_question(r, page, keyed) for _ in range(count)]


def _question(r: random.Random, page: Page, keyed: list[Line]) -> Question:
    draw = r.random()
    if keyed and draw < 0.62:
        return _value(r, r.choice(keyed))
    if len(keyed) > 1 and draw < 0.80:
        return _values(r, keyed)
    if draw < 0.95:
        i = r.randrange(len(page.lines))
        return Question(r.choice(READ_LINE).format(n=i + 1), page.lines[i].text)
    if draw < 0.97:
        return Question(r.choice(COUNT_LINES), str(len(page.lines)))
    return repetition(r)


def _value(r: random.Random, line: Line) -> Question:
    if line.day and r.random() < 0.35:
        return Question(DAY_OF.format(key=line.key), line.day.chinese)
    chinese = alphabet.is_wide(line.key[0])
    if chinese and r.random() < 0.12:
        return Question(VALUE_IN_SENTENCE.format(key=line.key), f"{line.key}是{line.value}。")
    return Question(r.choice(VALUE_OF if chinese else VALUE_OF_EN).format(key=line.key), line.value)


def _values(r: random.Random, keyed: list[Line]) -> Question:
    some = r.sample(keyed, min(len(keyed), r.choice((2, 2, 3))))
    draw = r.random()
    if draw < 0.3:
        prompt = VALUES_OF.format(keys="、".join(line.key for line in some))
        return Question(prompt, "\n".join(f"{line.key}:{line.value}" for line in some))
    if draw < 0.65:
        prompt = r.choice(VALUES_AS_JSON).format(keys="、".join(line.key for line in some))
    else:
        prompt, some = r.choice(FIELDS_AS_JSON), keyed[:3]
    return Question(prompt, json.dumps({line.key: line.value for line in some}, ensure_ascii=False))


def repetition(r: random.Random) -> Question:
    """A text to repeat, picture or not: it teaches the words that no page carries."""
    text = "".join(r.choice(alphabet.FREQUENT_HANZI) for _ in range(r.randint(2, 8)))
    if r.random() < 0.5:
        text = r.choice(PHRASES)
    return Question(REPEAT + text, text)


# What answers about documents are made of, beyond what pages show: so that adapters find the words in the vocabulary.
PHRASES = (
    "这是一张金额为 ¥8,650 的增值税发票,开票日期是2024年3月15日。",
    "这是一张收据,收款人是张伟,金额为 ¥120.00,付款方式是现金,日期是2024年3月15日。",
    "该申请表填写了姓名张伟、部门技术部、请假类型年假、天数3天。",
    "表格包含三列:产品名称、单价、数量。其中A款手机售价5999元,库存12台。",
    "这张图片展示了一个红色的消防车正在街道上行驶。",
    "请分析这张表单的内容,包括申请人、部门和事由。",
    "This is an invoice for $8,650.00 dated 2024-03-15.",
    "This is a receipt for $12.50 paid by Cash on 2024-03-15.",
    "This leave form was filled in by Alice Smith of Sales: Annual leave, 3 days.",
    '{"类型": "增值税发票", "金额": "¥8,650.00", "开票日期": "2024年3月15日", "号码": "12345678"}',
    '{"类型":"收据","收款人":"张伟","金额":"120","付款方式":"现金","日期":"2024-03-15"}',
    '{"姓名": "张伟", "部门": "技术部", "请假类型": "年假", "天数": "3", "事由": "回家"}',
    '{"type": "Invoice", "amount": "$8,650.00", "date": "2024-03-15", "number": "12345678"}',
    '{"name": "Alice Smith", "department": "Sales", "leave": "Annual", "days": "3", "reason": "", "method": "Cash"}',
    "图中的数字是几?数字5。这是什么单据?这张发票的金额是多少?描述这张图片。",
    "What document is this? Describe the image. The digit is 7. Yes. No.",
)
