"""Training jobs, evaluations and exports, watched: a live bar on a terminal, else plain lines or lines of JSON."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from veneer.trainer.v1.evaluation_pb2 import Evaluation
from veneer.trainer.v1.export_pb2 import Export
from veneer.trainer.v1.training_job_pb2 import TrainingJob
from veneer_client import Client, VeneerError, state_name
from veneer_client.commands import screen

LINE_INTERVAL_S = 5.0
_SPARK_POINTS = 200
_W = TypeVar("_W", TrainingJob, Evaluation, Export)


def watch_job(client: Client, name: str, json: bool) -> TrainingJob:
    """Shows a job until it has ended, and returns its last snapshot."""
    losses: list[float] = []
    shown = not json and sys.stdout.isatty()
    seen = client.jobs.curve(name, max_points=_SPARK_POINTS) if shown else ()  # what was before the watch began
    losses += [point.loss for point in seen]

    def picture(job: TrainingJob) -> RenderableType:
        return _job_bar(job, losses)

    def snapshots() -> Iterator[TrainingJob]:
        step = seen[-1].step if seen else 0
        for job in client.jobs.watch(name):
            if job.progress.step > step:
                step = job.progress.step
                losses.append(job.progress.loss)
            yield job

    job_id = name.removeprefix("trainingJobs/")
    again = f"`veneer jobs watch {job_id}` shows it again, `veneer jobs cancel {job_id}` ends it"
    with leaving(f"job {job_id} goes on. {again}"):
        return _show(snapshots(), picture, job_line, json)


def watch_evaluation(client: Client, name: str, json: bool) -> Evaluation:
    """Shows an evaluation until it has ended, and returns its last snapshot."""
    with leaving(f"{name} goes on. `veneer eval list` shows it"):
        return _show(client.evaluations.watch(name), _evaluation_bar, evaluation_line, json)


def watch_export(client: Client, name: str, json: bool) -> Export:
    """Shows an export until it has ended, and returns its last snapshot."""
    with leaving(f"{name} goes on without you"):
        return _show(client.exports.watch(name), _export_bar, export_line, json)


def export_line(export: Export) -> str:
    """An export in one line of text."""
    return f"{export.name} {state_name(export.state)}  {100 * export.progress:.0f} % done"


def job_line(job: TrainingJob) -> str:
    """A job in one line of text."""
    progress = job.progress
    if not progress.step:
        waits = f", {job.queue_position} before it" if job.queue_position else ""
        return f"{job.name} {state_name(job.state)}{waits}"
    parts = [
        f"{job.name} {state_name(job.state)}",
        f"step {progress.step}/{progress.total_steps}",
        f"epoch {progress.epoch:.2f}",
        f"loss {progress.loss:.4f}",
        *([f"validation {progress.validation_loss:.4f}"] if progress.HasField("validation_loss") else []),
        f"{progress.rows_per_second:.1f} rows/s",
        *([f"{screen.duration(screen.seconds(progress.remaining))} left"] if _has_time_left(job) else []),
    ]
    return "  ".join(parts)


def evaluation_line(evaluation: Evaluation) -> str:
    """An evaluation in one line of text."""
    # A figure of one field, such as `field_match/date`, has its place in the table of the result.
    figures = [f"{each.metric} {100 * each.value:.1f} %" for each in evaluation.metrics if "/" not in each.metric]
    done = f"{evaluation.answered_samples}/{evaluation.total_samples or '?'} answered"
    return "  ".join([f"{evaluation.name} {state_name(evaluation.state)}", done, *figures])


@contextmanager
def leaving(text: str) -> Iterator[None]:
    """Says what becomes of the work when a person interrupts the watching."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{text}", file=sys.stderr)
        raise


def _show(
    snapshots: Iterator[_W], picture: Callable[[_W], RenderableType], line: Callable[[_W], str], json: bool
) -> _W:
    last: _W | None = None
    if json:
        for last in snapshots:
            screen.print_json(screen.as_json(last))
    elif sys.stdout.isatty():
        with Live(console=screen.console(), refresh_per_second=8) as live:
            for last in snapshots:
                live.update(picture(last))
    else:
        last = _show_lines(snapshots, line)
    if last is None:
        raise VeneerError("the service ended the watch without a snapshot")
    return last


def _show_lines(snapshots: Iterator[_W], line: Callable[[_W], str]) -> _W | None:
    last: _W | None = None
    shown, shown_s = "", 0.0
    for snapshot in snapshots:
        moved = last is None or last.state != snapshot.state
        last = snapshot
        if (moved or time.monotonic() - shown_s >= LINE_INTERVAL_S) and (said := line(snapshot)) != shown:
            shown, shown_s = said, time.monotonic()
            print(shown, flush=True)
    if last is not None and line(last) != shown:
        print(line(last), flush=True)
    return last


def _job_bar(job: TrainingJob, losses: list[float]) -> RenderableType:
    progress = job.progress
    head = Text.assemble((job.name, "bold"), "  ", screen.state(job.state))
    if not progress.step:
        if job.queue_position:
            head.append(f"  {job.queue_position} before it")
        return head
    if len(job.attempts) > 1:
        head.append(f"  attempt {job.attempts[-1].number}", style="yellow")
    grid = Table.grid(padding=(0, 2, 0, 0))
    cells: list[RenderableType] = [
        ProgressBar(total=progress.total_steps, completed=progress.step, width=32),
        f"step {progress.step}/{progress.total_steps}",
        f"epoch {progress.epoch:.1f}",
        Text(f"{progress.rows_per_second:.1f} rows/s"),
        f"{screen.duration(screen.seconds(progress.remaining))} left" if _has_time_left(job) else "",
    ]
    grid.add_row(*cells)
    loss = Text.assemble("loss ", (f"{progress.loss:.4f}", "bold"), "  ", (screen.sparkline(losses), "cyan"))
    if progress.HasField("validation_loss"):
        loss.append(f"  validation {progress.validation_loss:.4f}")
    return Group(head, grid, loss)


def _has_time_left(job: TrainingJob) -> bool:
    return job.progress.HasField("remaining") and job.progress.step < job.progress.total_steps


def _evaluation_bar(evaluation: Evaluation) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    bar = ProgressBar(total=evaluation.total_samples or None, completed=evaluation.answered_samples, width=32)
    grid.add_row(bar, evaluation_line(evaluation))
    return grid


def _export_bar(export: Export) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(ProgressBar(total=1.0, completed=export.progress, width=32), export_line(export))
    return grid
