"""What commands print: tables for people, JSON for programs, and the words for figures."""

import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from veneer.trainer.v1.training_job_pb2 import JobState
from veneer_client import state_name

_COLOURS = {
    "succeeded": "green",
    "running": "cyan",
    "failed": "red",
    "dead lettered": "red",
    "cancelled": "yellow",
}
_SPARKS = "▁▂▃▄▅▆▇█"


def console() -> Console:
    """Standard output as it is now; wide enough for any table where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=200, highlight=False)


def error_console() -> Console:
    """Standard error as it is now."""
    return Console(stderr=True)


def as_json(message: Message) -> dict[str, Any]:
    """A message in the JSON of proto3, its fields named as in the contract."""
    return MessageToDict(message, preserving_proto_field_name=True)


def print_json(value: object) -> None:
    """Prints one line of JSON, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def print_messages(messages: Iterable[Message]) -> None:
    """Prints a list of messages as one JSON array."""
    print_json([as_json(message) for message in messages])


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], nothing: str) -> None:
    """Prints a table, or what to do where there is nothing to show; figures stand to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        table.add_row(*row)
    if table.row_count:
        console().print(table)
    else:
        print(nothing)


def print_facts(facts: Iterable[tuple[str, str | Text]]) -> None:
    """Prints names and values, those with an empty value left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts:
        if value:
            grid.add_row(Text(name, style="bold"), value)
    console().print(grid)


def state(value: JobState.ValueType) -> Text:
    """A state in its colour."""
    name = state_name(value)
    return Text(name, style=_COLOURS.get(name, ""))


def time(value: Timestamp) -> str:
    """A time in this machine's zone; empty where there is none."""
    if not value.seconds:
        return ""
    return datetime.fromtimestamp(value.seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def seconds(value: Duration) -> float:
    """A duration in seconds."""
    return value.ToMilliseconds() / 1000


def size(size_bytes: int) -> str:
    """`512 B`, `6.5 MB`: decimal, as disks are sold."""
    figure = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if figure < 999.5:
            return f"{figure:.0f} {unit}" if unit == "B" or figure >= 99.5 else f"{figure:.1f} {unit}"
        figure /= 1000
    return f"{figure:.1f} TB"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The course of some values, oldest first, each column the mean of its share."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_SPARKS[round((mean - low) / span * (len(_SPARKS) - 1))] for mean in means)
