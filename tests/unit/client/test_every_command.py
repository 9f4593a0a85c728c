"""What holds for every command that `pyproject.toml` registers, whichever package it comes from."""

import inspect
import re
import shlex
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from veneer_client import cli

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
ENTRIES = {name: EntryPoint(name, at, cli.COMMANDS) for name, at in PROJECT["entry-points"][cli.COMMANDS].items()}
WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    """The command line as it is with everything installed."""
    return cli.build_app(ENTRIES.values())


@pytest.mark.parametrize("name", ENTRIES)
def test_help_has_an_example_that_can_be_typed_and_json(app: typer.Typer, name: str) -> None:
    words = name.split(".")
    shown = CliRunner().invoke(app, [*words, "--help"], env=WIDE).output
    examples = re.findall(rf"^ *(veneer {' '.join(words)}(?: .*|))$", shown.partition("Example:")[2], re.MULTILINE)
    assert examples, shown
    assert "--json" in shown
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    command = getattr(command, "commands", {}).get(cli._ITSELF, command)
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert "--json" in known
    for example in examples:
        assert {word for word in shlex.split(example) if re.match("-[-a-z]", word)} <= known


@pytest.mark.parametrize("name", ENTRIES)
def test_every_option_is_explained(name: str) -> None:
    for parameter in inspect.signature(ENTRIES[name].load()).parameters.values():
        (option,) = parameter.annotation.__metadata__
        assert option.help, parameter.name


def test_every_group_is_explained() -> None:
    assert {name.partition(".")[0] for name in ENTRIES if "." in name} <= set(cli.GROUPS)
