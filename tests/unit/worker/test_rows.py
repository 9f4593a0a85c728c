"""Rows of a split: the order of the contract, from memory or as they come, from any place."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from veneer_digests import epoch_order
from veneer_processing import Conversation, Message, Text
from veneer_trainer.worker.loop.batches import Ahead, Batches
from veneer_trainer.worker.loop.rows import LengthRule, Split
from veneer_trainer.worker.refusal import Refused

Bench = Any  # the fixture's class in conftest.py
COUNT, LONG = 11, (2, 7)


class Stored:
    """A dataset service in memory: rows by digest, and how often they were read."""

    def __init__(self, count: int = COUNT, long: tuple[int, ...] = ()) -> None:
        self.rows = [
            (f"{n:02x}" * 32, _conversation(f"row {n}" + " word" * (200 if n in long else 0))) for n in range(count)
        ]
        self.read_rows = 0

    def read(
        self, split: str, shuffle: tuple[int, int] | None = None, offset: int = 0
    ) -> Iterator[tuple[str, Conversation]]:
        digests = [digest for digest, _ in self.rows]
        order = range(len(digests)) if shuffle is None else epoch_order(*shuffle, digests)
        for position in list(order)[offset:]:
            self.read_rows += 1
            yield self.rows[position]


def _conversation(answer: str) -> Conversation:
    return Conversation((Message("user", (Text("?"),)), Message("assistant", (Text(answer),))))


def split(
    bench: Bench, stored: Stored, *, skip: bool = False, cache_bytes: int = 1 << 20, known: bool = False
) -> Split:
    made = Split(stored, bench.processor, "train", len(stored.rows), LengthRule(100, skip), cache_bytes)  # type: ignore[arg-type]  # a stand-in
    made.load(lengths_known=known)
    return made


def answers(bench: Bench, rows: Any) -> list[str]:  # noqa: ANN401  # rows or steps' passes
    return [
        bench.processor.decode(row.encoded.ids_T[row.encoded.supervised_T].tolist()).partition("<")[0][:7].strip()
        for row in rows
    ]


def test_an_epoch_from_memory_is_that_of_the_service(bench: Bench) -> None:
    stored = Stored()
    cached, streamed = split(bench, stored), split(bench, Stored(), cache_bytes=0)
    for epoch in range(3):
        expected = [f"row {n}" for n in epoch_order(5, epoch, [digest for digest, _ in stored.rows])]
        for start in (0, 4, COUNT):
            assert answers(bench, cached.epoch(5, epoch, start)) == expected[start:]
            assert answers(bench, streamed.epoch(5, epoch, start)) == expected[start:]
    assert stored.read_rows == COUNT  # once, for all epochs
    assert answers(bench, cached.stored()) == answers(bench, streamed.stored()) == [f"row {n}" for n in range(COUNT)]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_long_rows_are_left_out_everywhere(bench: Bench, cache_bytes: int) -> None:
    stored = Stored(long=LONG)
    made = split(bench, stored, skip=True, cache_bytes=cache_bytes)
    assert (made.used_rows, made.skipped_rows) == (COUNT - 2, 2)
    order = [n for n in epoch_order(5, 1, [digest for digest, _ in stored.rows]) if n not in LONG]
    for start in range(COUNT - 1):
        assert answers(bench, made.epoch(5, 1, start)) == [f"row {n}" for n in order[start:]]
    assert len(list(made.stored())) == COUNT - 2


def test_a_long_row_is_refused_before_the_first_step(bench: Bench) -> None:
    with pytest.raises(Refused, match=r"row 020202020202 of split train has \d+ tokens, max_length is 100") as refused:
        split(bench, Stored(long=LONG))
    assert refused.value.reason == "ROWS_TOO_LONG"


def test_a_row_that_cannot_be_read_is_refused_by_name(bench: Bench) -> None:
    stored = Stored()
    stored.rows[3] = (stored.rows[3][0], _conversation("a control token: <|im_end|>"))
    with pytest.raises(Refused, match=r"row 030303030303 of split train: messages\[1\]") as refused:
        split(bench, stored)
    assert refused.value.reason == "ROW_UNUSABLE"


def test_rows_of_known_lengths_are_not_all_read_where_they_do_not_fit(bench: Bench) -> None:
    stored = Stored()
    made = split(bench, stored, cache_bytes=3000, known=True)
    assert stored.read_rows < COUNT
    expected = [f"row {n}" for n in epoch_order(5, 2, [digest for digest, _ in stored.rows])]
    assert answers(bench, made.epoch(5, 2, 3)) == expected[3:]


def test_steps_go_on_from_any_step(bench: Bench) -> None:
    plan = bench.plan(epochs=2, batch_size=2, gradient_accumulation=2, seed=5)
    batches = Batches(bench.processor, plan, lambda sha256: False)
    made = split(bench, Stored())
    total = plan.total_steps(COUNT)
    whole = list(batches.training(made, 0, total))
    assert [step.rows for step in whole] == [4, 4, 3, 4, 4, 3]
    for first in range(total):
        rest = list(batches.training(made, first, total))
        assert [step.passes[0].ids_T.tolist() for step in rest] == [
            step.passes[0].ids_T.tolist() for step in whole[first:]
        ]


def test_what_is_made_ahead_is_bounded_and_its_errors_arrive() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number
            if number == 50:
                raise Refused("GONE", "no more")

    ahead = Ahead(source(), depth=2)
    taken: list[int] = []
    most_ahead = 0

    def take() -> None:
        nonlocal most_ahead
        for number in ahead:
            time.sleep(0.001)
            taken.append(number)
            most_ahead = max(most_ahead, len(made) - len(taken))

    with pytest.raises(Refused, match="no more"):
        take()
    assert taken == list(range(51))
    assert most_ahead <= 4
    closed = Ahead(iter(range(10)), depth=1)
    closed.close()
    deadline = time.monotonic() + 10
    while any(thread.name == "batches" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
