"""Figures of a run for people."""

from typing import Any

import pytest

from veneer_trainer.worker.loop.batches import Step
from veneer_trainer.worker.loop.gauges import Gauges
from veneer_trainer.worker.loop.state import Figures

STEP = Step((), rows=2, tokens=30)


def progress(gauges: Gauges, step: int) -> Any:  # noqa: ANN401  # of generated code
    return gauges.progress(Figures(step=step), total_steps=100, epoch=0.5, rate=1e-4)


def test_rates_and_time_left_are_those_of_the_last_ten_seconds() -> None:
    gauges = Gauges("cpu")
    assert not progress(gauges, 0).HasField("remaining")
    for _ in range(20):
        gauges.count(1.0, STEP)
    quick = progress(gauges, 20)
    assert quick.remaining.ToSeconds() == 80
    assert (quick.tokens_per_second, quick.rows_per_second) == (30, 2)
    for _ in range(4):  # the machine has become slower
        gauges.count(4.0, STEP)
    slow = progress(gauges, 24)
    assert slow.remaining.ToSeconds() == 76 * 4
    assert slow.tokens_per_second == pytest.approx(7.5)
