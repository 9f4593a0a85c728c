import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_client.commands.chart import Line, Panel, draw, ticks
from veneer_client.commands.plot import smoothed

numbers = st.floats(-1e12, 1e12)


@given(numbers, st.floats(1e-6, 1e12))
def test_ticks_lie_within_and_are_few(low: float, width: float) -> None:
    high = low + width
    if high - low < 1e-12 * abs(low):
        return
    found = ticks(low, high)
    slack = (high - low) * 1e-6 + abs(low) * 1e-9
    assert len(found) <= 6
    assert all(low - slack <= tick <= high + slack for tick in found)


@pytest.mark.parametrize(("low", "high", "expected"), [(0, 10, [0, 2.5, 5, 7.5, 10]), (3, 3, [3])])
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(1, 0.0), (1000, 1e9)]])
def test_whatever_there_is_can_be_drawn(points: list[tuple[float, float]]) -> None:
    picture = draw([Panel("a", (Line("b", points, "#ff0000"),)), Panel("empty", (Line("", [], "#00ff00"),))])
    assert picture.size == (1000, 260)


def test_a_smoothed_line_is_the_running_mean() -> None:
    points = [(step, float(step % 2)) for step in range(100)]
    assert smoothed(points)[0] == (0, 0.0)
    assert {value for _, value in smoothed(points)[1:]} == {0.5}
    assert smoothed(points[:3]) == points[:3]
