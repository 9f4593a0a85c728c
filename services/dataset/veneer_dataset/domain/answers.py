"""Warnings about answers: of one, and of all together."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

VERY_LONG_CHARS = 8_000
CLOSED_SET_MAX = 50  # so many different answers at most are classes
ROWS_PER_CLASS_MIN = 5  # on average, for answers to count as classes
IMBALANCE_RATIO = 10
MIXED_SHARE = 0.1

# An order at the start, then a colon: what was asked, and only after it the answer.
_INSTRUCTION = re.compile(
    r"\s*((?:请|解释|描述|提取|识别|分析|翻译|回答|说明|总结|概括|读出|列出|写出|找出"
    r"|(?:please\s+|describe\b|explain\b|extract\b|identify\b|analy[sz]e\b|translate\b|summari[sz]e\b|read\b"
    r"|list\b|transcribe\b|answer\b|what\b|which\b|how\b))"
    r"[^\u3002.!?\uff01\uff1f\n:\uff1a]{0,60})[:\uff1a]\s*\S",
    re.IGNORECASE,
)
_HAN = re.compile(r"[㐀-䶿一-鿿]")
_LATIN = re.compile(r"[A-Za-z]{2}")


def instruction_in(text: str) -> str | None:
    """The order that a text begins with, up to its colon; None where there is none."""
    found = _INSTRUCTION.match(text)
    return found[1].strip() if found else None


def answer_warnings(text: str, *, is_pair: bool) -> list[tuple[str, str]]:
    """Code and finding of what is odd about one answer."""
    warnings = []
    if text.isspace():
        warnings.append(("ANSWER_BLANK", f"{len(text)} characters of white space"))
    if len(text) > VERY_LONG_CHARS:
        warnings.append(("ANSWER_VERY_LONG", f"{len(text)} characters"))
    if is_pair and (":" in text or "\uff1a" in text) and (instruction := instruction_in(text)):
        warnings.append(("INSTRUCTION_IN_TEXT", instruction))
    return warnings


def last_answer(row: dict[str, Any]) -> str:
    """The last supervised answer of a canonical row."""
    for message in reversed(row["messages"]):
        if message["role"] == "assistant" and "weight" not in message:
            return str(message["content"][0]["text"])
    raise AssertionError("an accepted row has an answer")


class AnswerCensus:
    """Counts answers of many rows: whether they are classes, of what sizes, and in which scripts.

    Keeps CLOSED_SET_MAX distinct answers at most.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._open = False
        self._rows = self._han = self._latin = 0

    def add(self, answer: str) -> None:
        """Counts the answer of one row."""
        self._rows += 1
        if _HAN.search(answer):
            self._han += 1
        elif _LATIN.search(answer):
            self._latin += 1
        if not self._open:
            self._counts[answer[:200]] += 1
            self._open = len(self._counts) > CLOSED_SET_MAX

    def warnings(self) -> Iterator[tuple[str, str]]:
        """Code and finding of what is odd about all of them."""
        classes = None if self._open else self._counts
        if classes and self._rows >= ROWS_PER_CLASS_MIN:
            (most, most_rows), (least, least_rows) = classes.most_common()[0], classes.most_common()[-1]
            if len(classes) == 1:
                yield "ANSWERS_CONSTANT", f"{self._rows} times {most}"
            elif self._rows >= ROWS_PER_CLASS_MIN * len(classes) and most_rows >= IMBALANCE_RATIO * least_rows:
                yield "ANSWERS_IMBALANCED", f"{most_rows} times {most[:80]}, {least_rows} times {least[:80]}"
        if min(self._han, self._latin) >= max(MIXED_SHARE * self._rows, 1):
            yield "LANGUAGES_MIXED", f"{self._han} answers with Chinese, {self._latin} with Latin letters only"
