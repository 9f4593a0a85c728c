"""The pages about running Veneer name flags that are there, and commands that can be typed."""

import dataclasses
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer

from veneer_client import cli
from veneer_dataset.settings import DatasetSettings
from veneer_inference.settings import InferenceSettings
from veneer_trainer.settings import TrainerSettings
from veneer_trainer.worker.settings import WorkerSettings

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PROCESSES = (DatasetSettings, InferenceSettings, TrainerSettings, WorkerSettings)


def commands(command: Any, words: str) -> dict[str, Any]:  # noqa: ANN401  # typer's own, private type
    found = {words: command}
    for name, each in getattr(command, "commands", {}).items():
        found |= commands(each, f"{words} {name}")
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """Every command by its words."""
    entries = [EntryPoint(name, at, cli.COMMANDS) for name, at in PROJECT["entry-points"][cli.COMMANDS].items()]
    return commands(typer.main.get_command(cli.build_app(entries)), "veneer")


@pytest.mark.parametrize("page", ["cli", "cluster", "datasets", "inference", "trainer"])
def test_flags_and_commands_are_there(known: dict[str, Any], page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    flags = {f"--{field.name.replace('_', '-')}" for kind in PROCESSES for field in dataclasses.fields(kind)}
    flags |= {flag for command in known.values() for parameter in command.params for flag in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named - {"--config", "--help"} <= flags
    for words in re.findall(r"(?:`|^    )(veneer(?: [a-z]+)+)", text, re.MULTILINE):
        assert words in known or words.rpartition(" ")[0] in known, words


def test_every_command_is_told() -> None:
    text = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for name in PROJECT["entry-points"][cli.COMMANDS]:
        group, _, command = name.rpartition(".")
        assert re.search(rf"veneer {group} [^|]*\b{command}\b" if group else rf"veneer {command}\b", text), name
    rows = [row.split("`")[1].partition(" [")[0] for row in text.splitlines() if row.startswith("| `veneer")]
    assert len(rows) == len(set(rows))
