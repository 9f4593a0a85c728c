"""The course of a job's figures: which points there are, and which of them a chart needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from veneer_trainer.domain.jobs import Point, Progress


def points_of(figures: Iterable[Progress], before: Progress | None) -> Iterator[Point]:
    """Yields the points that figures make.

    Args:
        figures: oldest first.
        before: the figures before them; a validation loss that has not changed since is not a new one.
    """
    for progress in figures:
        is_new = before is None or progress.validation_loss != before.validation_loss
        before = progress
        yield Point(
            progress.step,
            progress.measured_s,
            validation_loss=progress.validation_loss if is_new else None,
            **{name: getattr(progress, name) for name in Point.FIGURES},
        )


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Returns about as many points as wanted, evenly spread; first, last and all with a validation loss are kept."""
    kept = {round(index * (len(points) - 1) / (most - 1)) for index in range(most)} if len(points) > most else None
    return [
        point
        for index, point in enumerate(points)
        if kept is None or index in kept or point.validation_loss is not None
    ]
