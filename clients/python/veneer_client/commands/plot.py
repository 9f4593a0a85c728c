"""`veneer jobs plot`."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from veneer.trainer.v1.training_job_pb2 import TrainingProgress
from veneer_client import VeneerError
from veneer_client.commands import screen
from veneer_client.commands.options import Directory, Json, connect

POINTS = 2000
BLUE, LIGHT, RED = "#1f5fbf", "#b8cdea", "#c0392b"
_WINDOW = 50  # so many windows of a smoothed line fit into the whole


def plot(
    name: Annotated[str, typer.Argument(help="The job, as `veneer jobs list` names it.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("curves.png"),
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Draws the course of a job: loss, validation loss, learning rate, gradient norm.

    With --json the points themselves are printed and nothing is drawn.

    Example:
        veneer jobs plot 7f3a --out curves.png
    """
    with connect(directory) as client:
        points = client.jobs.curve(name, max_points=POINTS)
    if json:
        screen.print_messages(points)
        return
    if not points:
        raise VeneerError(f"{name} has no figures yet")
    try:
        from veneer_client.commands.chart import Line, Panel, draw
    except ModuleNotFoundError as error:
        raise VeneerError("drawing needs Pillow: pip install 'veneer[plot]'") from error
    loss = _course(points, lambda each: each.loss)
    validation = [(each.step, each.validation_loss) for each in points if each.HasField("validation_loss")]
    panels = [
        Panel(
            f"{name}: loss in nats per token",
            (
                Line("each step", loss, LIGHT),
                Line("mean", smoothed(loss), BLUE),
                Line("validation", validation, RED, marked=True),
            ),
        ),
        Panel("learning rate", (Line("", _course(points, lambda each: each.learning_rate), BLUE),)),
        Panel("gradient norm", (Line("", _course(points, lambda each: each.gradient_norm), BLUE),)),
    ]
    draw(panels).save(out, "PNG")
    print(f"{out}: {len(points)} points, step {points[0].step} to {points[-1].step}")


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Returns the running mean over a fiftieth of the points."""
    width, total = max(1, len(points) // _WINDOW), 0.0
    means = []
    for index, (step, value) in enumerate(points):
        total += value - (points[index - width][1] if index >= width else 0.0)
        means.append((step, total / min(index + 1, width)))
    return means


def _course(points: Sequence[TrainingProgress], figure: Callable[[TrainingProgress], float]) -> list[tuple[int, float]]:
    return [(each.step, figure(each)) for each in points if math.isfinite(figure(each))]
