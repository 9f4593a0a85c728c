"""`veneer dataset diff`, `report` and `sample`: looking at what is in a version."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from veneer.dataset.v1.conversation_pb2 import ROLE_ASSISTANT, Message
from veneer.dataset.v1.dataset_pb2 import DatasetVersion, Dialect, Finding, LengthBucket, Severity
from veneer.dataset.v1.dataset_service_pb2 import (
    PICTURE_FORM_DIGEST,
    PICTURE_FORM_ORIGINAL,
    PICTURE_FORM_RESIZED,
    Example,
)
from veneer_client import AsyncClient
from veneer_client._diff import DatasetDiff, DiffRow
from veneer_client.commands import screen
from veneer_client.commands.dataset_page import page
from veneer_client.commands.options import Directory, Json, connect
from veneer_client.commands.pictures import THUMBNAIL_PIXELS

_MAX_FINDINGS = 500
_TEXT_CHARS = 60
_BAR_CHARS = 40

Name = Annotated[str, typer.Argument(help="The dataset, such as digits, or digits@<digest> for a version.")]


def diff(
    before: Annotated[str, typer.Argument(help="The earlier version: a dataset, or digits@<digest>.")],
    after: Annotated[str, typer.Argument(help="The later version.")],
    limit: Annotated[int, typer.Option(help="Most rows to show of each kind.")] = 20,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Compares two versions row by row: added, gone, changed (answered otherwise), moved to another split.

    Example:
        veneer dataset diff forms@3f9a0c1b22d4 forms
    """

    async def compare() -> DatasetDiff:
        async with AsyncClient(directory=directory) as client:
            return await client.datasets.diff(before, after)

    found = asyncio.run(compare())
    if json:
        pairs = {"changed": found.changed, "moved": found.moved}
        screen.print_json(
            {
                "before": found.before.name,
                "after": found.after.name,
                "same_rows": found.same_rows,
                "added": [_row_json(row) for row in found.added],
                "gone": [_row_json(row) for row in found.gone],
                **{
                    kind: [{"before": _row_json(old), "after": _row_json(new)} for old, new in rows]
                    for kind, rows in pairs.items()
                },
            }
        )
        return
    print(
        f"{len(found.added)} added, {len(found.gone)} gone, {len(found.changed)} changed, "
        f"{len(found.moved)} moved, {found.same_rows} the same"
    )
    out = screen.console()
    for sign, colour, rows in (("+", "green", found.added), ("-", "red", found.gone)):
        for row in rows[:limit]:
            out.print(Text(f"{sign} {row.split}  {_question(row.example)} → {_answer(row.example)}", colour))
        _say_more(rows, limit)
    for old, new in found.changed[:limit]:
        words = f"~ {new.split}  {_question(new.example)} → {_answer(old.example)} ⇒ {_answer(new.example)}"
        out.print(Text(words, "yellow"))
    _say_more(found.changed, limit)
    for old, new in found.moved[:limit]:
        out.print(Text(f"» {old.split} ⇒ {new.split}  {_question(new.example)} → {_answer(new.example)}", "cyan"))
    _say_more(found.moved, limit)


def report(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Shows what became of every submitted row: files, splits, tokens, lengths, and how often each finding came.

    Example:
        veneer dataset report forms
    """
    with connect(directory) as client:
        version = client.datasets.get_version(name)
    if json:
        screen.print_json(screen.as_json(version))
        return
    told = version.report
    screen.print_facts(
        [
            ("version", f"{version.name.split('/')[1]}@{version.digest[:12]}"),
            ("rows", f"{told.submitted_rows:,} = {told.accepted_rows:,} accepted + {told.refused_rows:,} refused"),
            ("counted by", told.model),
            ("tokens", f"{told.train_tokens_per_epoch:,} an epoch" if told.model else ""),
        ]
    )
    print()
    screen.print_table(
        ("FILE", "DIALECT", ">SUBMITTED", ">ACCEPTED"),
        [
            (Text(line_of(each.path)), dialect(each.dialect), f"{each.submitted_rows:,}", f"{each.accepted_rows:,}")
            for each in told.row_files
        ],
        "no files",
    )
    print()
    screen.print_table(
        ("SPLIT", ">ROWS", ">VISUAL", ">PROMPT", ">SUPERVISED", ">LONGEST ROW"),
        [
            (
                each.split,
                f"{each.row_count:,}",
                *(f"{getattr(each.tokens, field):,}" if told.model else "" for field in _TOKEN_FIELDS),
            )
            for each in version.splits
        ],
        "no splits",
    )
    if told.length_histogram:
        print()
        screen.print_table((">TOKENS", ">ROWS", ""), list(_bars(told.length_histogram)), "no rows")
    print()
    screen.print_table(
        ("FINDING", "SEVERITY", ">COUNT"),
        [(each.code, severity(each.severity), f"{each.count:,}") for each in told.finding_counts],
        "no findings",
    )


def sample(
    name: Name,
    split: Annotated[
        str, typer.Option(help="Which split. Default: the first that there is, train before others.")
    ] = "",
    count: Annotated[int, typer.Option(min=1, max=2000, help="How many rows.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Other rows for another seed.")] = 0,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with pictures, findings and histograms to this file.")
    ] = None,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Shows some rows of a version: as a table, or as one self-contained page that a person can scroll.

    Example:
        veneer dataset sample forms --count 50 --html forms.html
    """
    version, rows, findings = asyncio.run(_read(name, split, count, seed, directory, html is not None))
    if html is not None:
        html.write_text(page(version, rows, findings), "utf-8")
        print(f"{len(rows)} rows are in {html}")
    elif json:
        screen.print_json([screen.as_json(row) for row in rows])
    else:
        screen.print_table(
            (">ROW", ">PICTURES", "QUESTION", "ANSWER"),
            [(str(row.index), str(_picture_count(row)), Text(_question(row)), Text(_answer(row))) for row in rows],
            "no rows",
        )


async def _read(
    name: str, split: str, count: int, seed: int, directory: Path | None, with_pictures: bool
) -> tuple[DatasetVersion, list[Example], list[Finding]]:
    async with AsyncClient(directory=directory) as client:
        version = await client.datasets.get_version(name)
        names = [each.split for each in version.splits]
        split = split or ("train" if "train" in names else names[0])
        if not with_pictures:
            form, model = PICTURE_FORM_DIGEST, ""
        else:
            model = version.report.model or await anext((each.name async for each in client.models.list()), "")
            form = PICTURE_FORM_RESIZED if model else PICTURE_FORM_ORIGINAL
        rows = [
            row
            async for row in client.datasets.examples(
                version.name,
                split,
                seed=seed,
                limit=count,
                picture_form=form,
                model=model,
                max_pixels=THUMBNAIL_PIXELS if model else 0,
            )
        ]
        findings: list[Finding] = []
        if with_pictures:
            async for finding in client.datasets.findings(version.name):
                findings.append(finding)
                if len(findings) == _MAX_FINDINGS:
                    break
        return version, rows, findings


def dialect(value: Dialect.ValueType) -> str:
    """A dialect as people call it."""
    return Dialect.Name(value).removeprefix("DIALECT_").lower()


def severity(value: Severity.ValueType) -> str:
    """A severity as people call it."""
    return Severity.Name(value).removeprefix("SEVERITY_").lower()


def line_of(text: str, limit: int = _TEXT_CHARS) -> str:
    """A text on one line of a terminal, which is sent no control character of another's making."""
    flat = " ".join(text[: 4 * limit].split())
    shown = "".join(each if each.isprintable() else "\ufffd" for each in flat)
    return shown if len(shown) <= limit and len(text) <= 4 * limit else f"{shown[: limit - 1]}…"


_TOKEN_FIELDS = ("visual", "prompt", "supervised", "longest_row")


def _bars(histogram: Iterable[LengthBucket]) -> Iterable[tuple[str, str, str]]:
    buckets = list(histogram)
    most = max(each.row_count for each in buckets)
    for each in buckets:
        bar = "█" * max(1, round(_BAR_CHARS * each.row_count / most))
        yield f"from {each.at_least_tokens:,}", f"{each.row_count:,}", bar


def _texts(messages: Iterable[Message]) -> str:
    return " ".join("▣" if part.HasField("picture") else part.text for message in messages for part in message.parts)


def _question(row: Example) -> str:
    return line_of(_texts(each for each in row.messages if each.role != ROLE_ASSISTANT))


def _answer(row: Example) -> str:
    return line_of(_texts(each for each in row.messages if each.role == ROLE_ASSISTANT))


def _picture_count(row: Example) -> int:
    return sum(part.HasField("picture") for message in row.messages for part in message.parts)


def _row_json(row: DiffRow) -> dict[str, object]:
    return {"split": row.split, "row": screen.as_json(row.example)}


def _say_more(rows: tuple[object, ...], limit: int) -> None:
    if len(rows) > limit:
        print(f"  and {len(rows) - limit} more")
