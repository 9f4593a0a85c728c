"""Figures of versions between two reports."""

from veneer_inference.domain.figures import FiguresByVersion
from veneer_inference.domain.registry import Release
from veneer_rpc.names import AdapterVersionName

ONE = Release("acme", AdapterVersionName("digits", 1), "ab" * 32)


def test_they_are_handed_over_once_and_can_be_given_back() -> None:
    figures = FiguresByVersion()
    for latency_s in range(1, 101):
        figures.answered(ONE, latency_s / 100)
    figures.failed(ONE)
    taken = figures.take()
    assert (taken[ONE].answered, taken[ONE].failed, taken[ONE].latency_p95_s()) == (100, 1, 0.95)
    assert not figures.take()
    figures.answered(ONE, 9.0)
    figures.give_back(taken)
    again = figures.take()[ONE]
    assert (again.answered, again.failed, list(again.latencies_s)[-1]) == (101, 1, 9.0)


def test_without_answers_there_is_no_latency() -> None:
    figures = FiguresByVersion()
    figures.failed(ONE)
    assert figures.take()[ONE].latency_p95_s() == 0.0
