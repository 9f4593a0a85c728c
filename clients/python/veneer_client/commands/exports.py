"""`veneer adapters export`."""

import json as json_text
from base64 import b64decode
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.trainer.v1.export_pb2 import Export
from veneer_client import succeeded
from veneer_client._exports import FORMATS, is_taken
from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.options import Directory, Json, connect
from veneer_client.commands.watching import watch_export


def export(
    name: Annotated[str, typer.Argument(help="The adapter.")],
    version: Annotated[int, typer.Argument(min=1, help="The version's number.")],
    out: Annotated[Path, typer.Option(help="Gets the export; must not exist.")],
    format: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}.")] = "merged-fp32",
    split: Annotated[str, typer.Option(help="Rows to check it on. Default: test, else validation, else train.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Keep it even when it answers worse.")] = False,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Makes a model that stands alone, waits for it and downloads it with its certificate.

    Example:
        veneer adapters export digits 3 --format merged-fp32 --out ./digits-merged
    """
    if format not in FORMATS:
        raise typer.BadParameter(f"must be one of {', '.join(FORMATS)}, was {format!r}", param_hint="--format")
    if is_taken(out):
        raise typer.BadParameter(f"{out} is there already", param_hint="--out")
    with connect(directory) as client:
        queued = client.exports.create(f"{name}@{version}", format, split=split, force=force)
        made = succeeded(watch_export(client, queued.name, json))
        client.exports.download(made.name, out)
    measured = _measured(made)
    if json:
        files = [file.path for file in made.files]
        screen.print_json({"folder": str(out), "digest": made.digest, "files": files, "measured": measured})
        return
    size_bytes = sum(file.size_bytes for file in made.files)
    print(f"{out}: {short(made.spec.adapter_version)} as {format}, {screen.size(size_bytes)}, {made.digest[:12]}")
    for line in _lines(measured):
        print(f"  {line}")
    print(f"check it anywhere: veneer verify {out}; serve it: veneer serve {out}")


def list_exports(json: Json = False, directory: Directory = None) -> None:
    """Lists exports, newest first.

    Example:
        veneer adapters exports
    """
    with connect(directory) as client:
        exports = list(client.exports.list())
    if json:
        screen.print_messages(exports)
        return
    rows = [
        (
            short(each.name),
            short(each.spec.adapter_version),
            _form(each),
            screen.state(each.state),
            screen.size(sum(file.size_bytes for file in each.files)) if each.files else "",
            screen.time(each.create_time),
            each.failure.message,
        )
        for each in exports
    ]
    columns = ("EXPORT", "VERSION", "FORMAT", "STATE", ">SIZE", "ORDERED", "WHY NOT")
    screen.print_table(columns, rows, "no exports yet: veneer adapters export NAME N --out DIR")


def _form(export: Export) -> str:
    pair = export.spec.format, export.spec.dtype
    return next((name for name, each in FORMATS.items() if each == pair), "")


def _measured(export: Export) -> dict[str, Any]:
    """What the certificate says was measured; `veneer verify` is what checks its signature."""
    envelope = json_text.loads(export.certificate)
    measured: dict[str, Any] = json_text.loads(b64decode(envelope["payload"]))["predicate"]["measured"]
    return measured


def _lines(measured: dict[str, Any]) -> list[str]:
    tied = f" and {measured['answers_within_tie']} within a tie" if measured["answers_within_tie"] else ""
    lines = [
        f"{measured['answers_identical']}{tied} of {measured['prompts']} answers are the adapter's own; "
        f"logits differ by at most {measured['greatest_logit_difference']:.2g}"
    ]
    lines += [
        f"{metric}: {100 * each['export']:.1f} %, the adapter's {100 * each['adapter']:.1f} %"
        for metric, each in measured["metrics"].items()
    ]
    rate = measured["tokens_per_second"]
    lines.append(f"{rate['export']:g} tokens/s, {rate['adapter']:g} of torch with the adapter")
    return lines + [f"kept by force: {problem}" for problem in measured["problems"]]
