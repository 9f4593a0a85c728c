"""The `veneer` command. It owns no command of its own: installed packages register theirs by entry point.

An entry `base.verify` in the group `veneer.commands` becomes `veneer base verify`; its value is a function in
Typer's style that imports what is heavy when it runs, so that `--help` is instant. An extra is named after
the package that needs it (`veneer_vlm` needs `veneer[vlm]`), so a command can say which one it lacks.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from itertools import takewhile
from traceback import walk_tb
from types import TracebackType
from typing import Annotated, Any

import typer
import typer.core
from rich.markup import escape

from veneer_client._errors import Internal, StatusError, Unauthenticated, Unavailable, VeneerError

COMMANDS = "veneer.commands"

GROUPS = {
    "adapters": "Adapters: versions of what was learned, and which of them answers.",
    "base": "Base models: where they are, whether they work, and the demonstration base.",
    "dataset": "Datasets: pictures and text to learn from.",
    "eval": "Evaluations: a split of a dataset, asked of an adapter version or of the base.",
    "jobs": "Training jobs: what was ordered, and how far it is.",
    "models": "Base models of the cluster.",
    "tokens": "Tokens: who may call the cluster.",
}
# What a person can do about an error beyond what its text says.
ADVICE: dict[type[StatusError], str] = {
    Unauthenticated: "set VENEER_TOKEN to a token of the cluster",
    Unavailable: "VENEER_DATASET, VENEER_TRAINER and VENEER_INFERENCE name the addresses of a cluster",
    Internal: "this is a defect of the service: its log has the cause",
}


_ITSELF = "run"


class _GroupThatActs(typer.core.TyperGroup):
    """A group that is a command too: what names none of those below it is meant for itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # typer's own, private type
        """See TyperGroup."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else [_ITSELF, *args])


def main() -> None:
    """Runs the command line; exits with 0, 1 (it failed), 2 (it was called wrongly) or 130 (interrupted)."""
    try:
        build_app(meant(entry_points(group=COMMANDS), sys.argv[1:]))()
    except VeneerError as error:
        print(as_json(error) if "--json" in sys.argv else as_text(error), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # while commands are still being loaded; later ones end in Typer
        sys.exit(130)
    except ModuleNotFoundError as error:
        extra = extra_of_traceback(error.__traceback__)
        if extra is None:
            raise
        print(missing_extra("this command", error, extra), file=sys.stderr)
        sys.exit(1)


def meant(commands: Iterable[EntryPoint], words: Sequence[str]) -> list[EntryPoint]:
    """The command that the words of a command line name, with those below it; all where they name none.

    Importing what defines all the others takes a second.
    """
    by_name = {entry.name: entry for entry in commands}
    leading = list(takewhile(lambda word: not word.startswith("-"), words))
    paths = (".".join(leading[:count]) for count in range(len(leading), 0, -1))
    named = next((path for path in paths if path in by_name), None)
    return [entry for name, entry in by_name.items() if named is None or name == named or name.startswith(f"{named}.")]


def build_app(commands: Iterable[EntryPoint]) -> typer.Typer:
    """Hangs each registered command at the place that its dotted name says."""
    app = typer.Typer(
        name="veneer",
        help="Fine-tune a vision-language model on your own pictures and text, and serve what comes out.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    entries = sorted(commands, key=lambda entry: entry.name)
    names = {entry.name.rpartition(".")[0] for entry in entries}
    groups: dict[str, typer.Typer] = {}
    for entry in entries:
        group, _, name = entry.name.rpartition(".")
        if entry.name in names:  # a command that has others below it, such as `eval` and `eval compare`
            group, name = name, _ITSELF
        parent = app
        if group:
            if group not in groups:
                kind = _GroupThatActs if name == _ITSELF else typer.core.TyperGroup
                groups[group] = typer.Typer(cls=kind, help=GROUPS[group], no_args_is_help=kind is not _GroupThatActs)
                app.add_typer(groups[group], name=group)
            parent = groups[group]
        function, settings = load(entry)
        parent.command(name, **({"help": help_of(function)} | settings))(function)
    return app


def as_text(error: VeneerError) -> str:
    """What a person reads of an expected error: what happened, each wrong field, and what to do."""
    lines = [f"veneer: {error}"]
    if isinstance(error, StatusError):
        lines += [f"  {each.field}: {each.description}" for each in error.violations]
        if error.retry_after_s is not None:
            lines.append(f"  try again in {error.retry_after_s:g} s")
        advice = next((text for kind, text in ADVICE.items() if isinstance(error, kind)), "")
        lines += [f"  {advice}"] if advice else []
    return "\n".join(lines)


def as_json(error: VeneerError) -> str:
    """The same for a program, in one line."""
    fields: dict[str, object] = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, StatusError):
        fields |= {"reason": error.reason, "message": error.message, "retry_after_s": error.retry_after_s}
        fields["violations"] = [dataclasses.asdict(each) for each in error.violations]
    return json.dumps({"error": fields}, ensure_ascii=False)


def print_version(wanted: bool) -> None:
    """Prints the version and ends the program, when asked to."""
    if wanted:
        print(version("veneer"))
        raise typer.Exit


def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Declares what may stand before any command."""


def load(entry: EntryPoint) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Returns the command's function, or one that names the extra when its package cannot be imported."""
    try:
        return entry.load(), {}
    except ModuleNotFoundError as error:
        extra = extra_of_module(entry.module)
        if extra is None:
            raise
        text = missing_extra(f"`{entry.name.replace('.', ' ')}`", error, extra)

    def not_installed() -> None:
        print(text, file=sys.stderr)
        raise typer.Exit(1)

    # Whatever was typed after the command, the answer is the same.
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return not_installed, {"help": escape(f"Not installed: {install(extra)}"), "context_settings": anything}


def help_of(function: Callable[..., Any]) -> str:
    """A command's docstring, its example kept on lines of its own."""
    text = escape(inspect.getdoc(function) or "")  # brackets are no markup here
    return text.replace("\n\nExample:", "\n\n\b\nExample:")


def extra_of_module(module: str) -> str | None:
    """The extra that a module of Veneer needs: `veneer_vlm.cli` → `vlm`; none for the client and others."""
    package = module.partition(".")[0]
    own = package.startswith("veneer_") and package != __package__
    return package.removeprefix("veneer_") if own else None


def extra_of_traceback(traceback: TracebackType | None) -> str | None:
    """The extra of the package whose command failed: the outermost frame that belongs to a part of Veneer."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(traceback))
    return next((extra for module in modules if (extra := extra_of_module(module))), None)


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'veneer[{extra}]'"


def missing_extra(command: str, error: ModuleNotFoundError, extra: str) -> str:
    """The text for a person who lacks an extra."""
    return f"veneer: {command} needs {error.name}, which is not installed. Install it with: {install(extra)}"
