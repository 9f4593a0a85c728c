"""Random values as they stand on office documents: money, dates, numbers, names, words.

Owns the distributions. Every function takes the generator it draws from, so that a seed fixes everything.
"""

import dataclasses
import random

from veneer_base import alphabet


@dataclasses.dataclass(frozen=True)
class Day:
    """A date, and the ways it is printed."""

    year: int
    month: int
    day: int

    @property
    def chinese(self) -> str:
        """As in 2024年3月5日."""
        return f"{self.year}年{self.month}月{self.day}日"

    @property
    def dashed(self) -> str:
        """As in 2024-03-05."""
        return f"{self.year}-{self.month:02d}-{self.day:02d}"

    @property
    def slashed(self) -> str:
        """As in 2024/03/05."""
        return f"{self.year}/{self.month:02d}/{self.day:02d}"

    @property
    def dotted(self) -> str:
        """As in 2024.03.05 ."""
        return f"{self.year}.{self.month:02d}.{self.day:02d}"


def day(r: random.Random) -> Day:
    """A day from 2000 to 2029."""
    return Day(r.randint(2000, 2029), r.randint(1, 12), r.randint(1, 28))


def date(r: random.Random) -> str:
    """A printed date."""
    d = day(r)
    return r.choices((d.chinese, d.dashed, d.slashed, d.dotted), (40, 35, 15, 10))[0]


def digits(r: random.Random, shortest: int, longest: int) -> str:
    """A string of digits; a leading zero is as likely as any."""
    return "".join(r.choice(alphabet.DIGITS) for _ in range(r.randint(shortest, longest)))


def amount(r: random.Random) -> str:
    """An amount from 1 to 999,999 with thousands separated, with cents half of the time, without a currency."""
    whole = r.randint(1, 10 ** r.choice((2, 3, 4, 5, 6)) - 1)
    return f"{whole:,}" + (f".{r.randint(0, 99):02d}" if r.random() < 0.5 else "")


def money(r: random.Random) -> str:
    """A printed amount of money."""
    text = amount(r)
    if r.random() < 0.15:
        text = text.replace(",", "")
    sign = r.choices(("¥", "", "$"), (50, 30, 20))[0]
    return sign + text + ("元" if not sign and r.random() < 0.3 else "")


def code(r: random.Random) -> str:
    """A serial number such as B-2041 or INV20240017."""
    prefix = r.choice(("INV", "NO", "PO", "SN", *alphabet.LATIN[:26]))
    return f"{prefix}{r.choice(('', '-'))}{digits(r, 2, 8)}"


def percentage(r: random.Random) -> str:
    """A tax rate."""
    return f"{r.choice((1, 3, 5, 6, 9, 13, r.randint(1, 99)))}%"


def hanzi(r: random.Random, shortest: int, longest: int) -> str:
    """Chinese characters of the alphabet in no order that means anything."""
    return "".join(r.choice(alphabet.HANZI) for _ in range(r.randint(shortest, longest)))


def person(r: random.Random) -> str:
    """A Chinese name of two or three characters."""
    return r.choice(alphabet.SURNAMES) + "".join(r.choice(alphabet.GIVEN) for _ in range(r.choice((1, 1, 2))))


def company(r: random.Random) -> str:
    """A Chinese company's short name."""
    return r.choice(alphabet.CITIES) + r.choice(alphabet.COMPANIES) + alphabet.COMPANY_END


def person_en(r: random.Random) -> str:
    """An English name."""
    return f"{r.choice(alphabet.FIRST_NAMES)} {r.choice(alphabet.LAST_NAMES)}"


def words_zh(r: random.Random) -> str:
    """One Chinese word of the vocabulary, or two."""
    return "".join(r.choice(alphabet.WORDS_ZH) for _ in range(r.choice((1, 1, 1, 2))))


def words_en(r: random.Random) -> str:
    """One English word of the vocabulary, or two, at times in capitals."""
    text = " ".join(r.choice(alphabet.WORDS_EN) for _ in range(r.choice((1, 1, 2))))
    return text.upper() if r.random() < 0.1 else text
