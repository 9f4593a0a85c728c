"""Plays one scene: push, ask the base, train, swap in, ask again, and show some answers side by side."""

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from rich.live import Live
from rich.table import Table
from rich.text import Text

from veneer.trainer.v1.evaluation_pb2 import Evaluation, Metric
from veneer_client import Client, VeneerError, succeeded
from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.watching import watch_evaluation, watch_job
from veneer_cluster.demo.scenes import Row, Scene, write
from veneer_cluster.folder import Folder

SHOWN_PICTURES = 3
LONGEST_ANSWER_TOKENS = 96
LONGEST_SHOWN = 96  # columns
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Result:
    """What a scene came to: figures of base and adapter on the same test split, and what was asked for.

    Attributes:
        training_s: from the order to the published version.
        total_s: of the whole scene.
        floor: what the adapter must reach.
        missed: what was not reached, in words.
    """

    scene: str
    metric: str
    base: float
    base_interval: tuple[float, float]
    adapter: float
    adapter_interval: tuple[float, float]
    images: int
    training_s: float
    total_s: float
    adapter_version: str
    adapter_digest: str
    dataset_digest: str
    floor: float
    missed: tuple[str, ...]
    measured: str

    def line(self) -> str:
        """The scene's last word."""
        return (
            f"{self.scene}: held-out {self.measured}: base {100 * self.base:.1f} % -> "
            f"adapter {100 * self.adapter:.1f} % ({self.images} images, {self.training_s:.0f} s)"
        )


def play(client: Client, cluster: Folder, scene: Scene, folder: Path, published: float | None) -> Result:
    """Plays a scene in an empty folder.

    Args:
        client: of a running cluster.
        cluster: its folder; its replicas must not have been restarted when the scene ends.
        scene: what to learn.
        folder: gets the scene's rows and pictures.
        published: the documented figure, which may be missed by three points; None where there is none.
    """
    started_s = time.monotonic()
    say(scene.title)
    rows = write(scene, folder)
    push = client.datasets.push(folder, scene.name)
    report = push.version.report
    print(f"pushed {report.accepted_rows:,} rows, {screen.size(push.sent_bytes)}: {push.version.digest[:12]}")
    print("asking the bare base")
    base = _evaluate(client, scene, None)
    replicas = _replica_pids(cluster)

    ordered_s = time.monotonic()
    job = client.jobs.train(scene.name, scene.name, spec=scene.recipe)
    job = succeeded(watch_job(client, job.name, json=False))
    training_s = time.monotonic() - ordered_s
    version = client.adapters.get_version(job.adapter_version)

    _show_side_by_side(client, scene, rows["test"][:SHOWN_PICTURES], job.adapter_version)
    if _replica_pids(cluster) != replicas:
        raise VeneerError("a replica was restarted while the adapter was swapped in: see `veneer logs`")
    print(f"{short(version.name)} was swapped in: the replicas run on as {', '.join(map(str, replicas))}")
    print("asking the adapter")
    adapter = _evaluate(client, scene, f"{scene.name}@{version.name.rpartition('/')[2]}")
    floor = scene.least if published is None else max(scene.least, published - 0.03)
    return Result(
        scene.title,
        scene.metric,
        base.value,
        (base.low, base.high),
        adapter.value,
        (adapter.low, adapter.high),
        len(rows["test"]),
        training_s,
        time.monotonic() - started_s,
        version.name,
        version.digest,
        push.version.digest,
        floor,
        missed(scene, base.value, adapter.value, floor),
        scene.measured,
    )


def missed(scene: Scene, base: float, adapter: float, floor: float) -> tuple[str, ...]:
    """What a scene did not reach, in words; empty where it reached all."""
    problems = []
    if adapter < floor:
        problems.append(f"{scene.measured} {100 * adapter:.1f} %, at least {100 * floor:.1f} % was asked for")
    if scene.most_of_base_error is not None and 1 - adapter > scene.most_of_base_error * (1 - base) + _ROUNDING:
        left = 100 * (1 - adapter) / (1 - base) if base < 1 else 100.0
        most = 100 * scene.most_of_base_error
        problems.append(f"{left:.0f} % of the base's error is left, at most {most:.0f} % was asked for")
    return tuple(problems)


def say(title: str) -> None:
    """Prints the head of a part."""
    screen.console().rule(Text(title, style="bold"), align="left")


def _evaluate(client: Client, scene: Scene, adapter: str | None) -> Metric:
    evaluation = client.evaluations.create(scene.name, adapter=adapter, split="test", metrics=[scene.metric])
    done: Evaluation = succeeded(watch_evaluation(client, evaluation.name, json=False))
    return next(metric for metric in done.metrics if metric.metric == scene.metric)


def _replica_pids(cluster: Folder) -> list[int]:
    state = cluster.read_state()
    return [process.pid for process in state.processes if process.name.startswith("replica-")] if state else []


def _show_side_by_side(client: Client, scene: Scene, rows: list[Row], version: str) -> None:
    """Streams base and adapter at the same time, each into its column."""
    answers = [["", ""] for _ in rows]

    def ask(row: int, column: int) -> None:
        picture, question, _ = rows[row]
        data = BytesIO()
        picture.save(data, "PNG")
        adapter = None if column == 0 else scene.name
        for piece in client.stream(question, image=data.getvalue(), adapter=adapter, max_tokens=LONGEST_ANSWER_TOKENS):
            answers[row][column] += piece.text
            if adapter and piece.served_by.adapter_version not in ("", version):
                failures.append(f"{piece.served_by.adapter_version} answered, not {version}")

    def table() -> Table:
        drawn = Table("EXPECTED", "BASE", "ADAPTER", box=None, padding=(0, 2, 0, 0), header_style="bold")
        for (_, _, expected), (base, adapter) in zip(rows, answers, strict=True):
            drawn.add_row(expected, _shown(base, "yellow"), _shown(adapter, "green"))
        return drawn

    failures: list[str] = []
    threads = [
        threading.Thread(target=_caught, args=(ask, row, column, failures))
        for row in range(len(rows))
        for column in (0, 1)
    ]
    for thread in threads:
        thread.start()
    if sys.stdout.isatty():
        with Live(console=screen.console(), refresh_per_second=12) as live:
            while any(thread.is_alive() for thread in threads):
                live.update(table())
                time.sleep(0.05)
            live.update(table())
    for thread in threads:
        thread.join()
    if not sys.stdout.isatty():
        screen.console().print(table())
    if failures:
        raise VeneerError(failures[0])


def _shown(answer: str, style: str) -> Text:
    text = Text(answer.replace("\n", " "), style=style)
    text.truncate(LONGEST_SHOWN, overflow="ellipsis")
    return text


def _caught(ask: Callable[[int, int], None], row: int, column: int, failures: list[str]) -> None:
    try:
        ask(row, column)
    except VeneerError as error:
        failures.append(str(error))
