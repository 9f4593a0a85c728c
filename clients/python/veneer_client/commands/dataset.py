"""`veneer dataset …`."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from veneer.dataset.v1.dataset_pb2 import (
    DatasetVersion,
    Dialect,
    Finding,
    FractionSplits,
    GroupKey,
    Severity,
    SplitPolicy,
)
from veneer_client import Client, PushProgress, RowsRefused
from veneer_client.commands import screen
from veneer_client.commands.options import Directory, Json, connect

_SHOWN_FINDINGS = 10
_TOKENS = ("visual", "prompt", "supervised")
_SEVERITIES = {
    Severity.SEVERITY_ERROR: ("error", "red"),
    Severity.SEVERITY_WARNING: ("warning", "yellow"),
    Severity.SEVERITY_INFO: ("info", "dim"),
}


class Group(StrEnum):
    """What rows must share to stay in one split."""

    PICTURES = "picture"
    FIELD = "field"
    NONE = "none"


Name = Annotated[str, typer.Argument(help="The dataset, such as digits, or digits@<digest> for a version.")]


def push(
    folder: Annotated[
        Path, typer.Argument(help="Holds *.jsonl, *.parquet or a saved `datasets` folder, and pictures.")
    ],
    name: Annotated[str, typer.Option("--name", help="The dataset; created when it does not exist.")],
    prompt: Annotated[str | None, typer.Option(help="Question of the rows that have none of their own.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Count tokens by this base's contract; '' counts none. Default: the only base.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A single refused row refuses all.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and report, keep no version.")] = False,
    split: Annotated[
        list[str] | None,
        typer.Option(help="A split and its share, such as train=0.8; once for each. Default: as files and rows say."),
    ] = None,
    group: Annotated[Group, typer.Option(help="With --split: rows that share this stay together.")] = Group.PICTURES,
    stratified: Annotated[
        bool, typer.Option("--stratified", help="With --split: share out each answer alike. May move rows later.")
    ] = False,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Uploads a folder of rows and pictures, and freezes it as a version with a digest and a report.

    What the service has already is not sent again; a push that broke off goes on where it was.

    Example:
        veneer dataset push office-forms --name forms --prompt "What does this form say?"
        veneer dataset push digits --name digits --split train=0.8 --split test=0.2 --stratified
        veneer dataset push hub-parquet --name captions   # with pip install 'veneer[tables]'
    """
    policy = _split_policy(split or [], group, stratified)
    with connect(directory) as client, _bar() as on_progress:
        try:
            done = client.datasets.push(
                folder,
                name,
                prompt=prompt,
                model=_only_model(client) if model is None else model,
                split_policy=policy,
                strict=strict,
                validate_only=dry_run,
                on_progress=on_progress,
            )
        except RowsRefused as refused:
            if not json:
                _print_findings(refused.findings)
            raise
    if json:
        findings = [screen.as_json(finding) for finding in done.findings]
        sent = {
            "sent_blobs": done.sent_blobs,
            "sent_bytes": done.sent_bytes,
            "reused_blobs": done.reused_blobs,
        }
        screen.print_json({"version": screen.as_json(done.version), "findings": findings, **sent})
        return
    print(f"sent {done.sent_blobs} files, {screen.size(done.sent_bytes)}; {done.reused_blobs} were there")
    _print_version(done.version)
    _print_findings(done.findings)


def list_datasets(json: Json = False, directory: Directory = None) -> None:
    """Lists datasets, newest first.

    Example:
        veneer dataset list
    """
    with connect(directory) as client:
        datasets = list(client.datasets.list())
    if json:
        screen.print_messages(datasets)
        return
    rows = [
        (
            each.name.removeprefix("datasets/"),
            str(each.version_count),
            each.latest_version[-64:][:12],
            screen.time(each.update_time),
        )
        for each in datasets
    ]
    screen.print_table(
        ("DATASET", ">VERSIONS", "NEWEST", "CHANGED"),
        rows,
        "no datasets yet: veneer dataset push DIR --name NAME",
    )


def show(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Shows a version of a dataset, its report and its findings.

    Example:
        veneer dataset show digits
    """
    with connect(directory) as client:
        version = client.datasets.get_version(name)
        findings = list(client.datasets.findings(version.name))
    if json:
        screen.print_json(
            {
                "version": screen.as_json(version),
                "findings": [screen.as_json(finding) for finding in findings],
            }
        )
        return
    _print_version(version)
    _print_findings(findings, len(findings))


def _only_model(client: Client) -> str:
    models = [model.name for model in client.models.list()]
    return models[0] if len(models) == 1 else ""


def _split_policy(shares: list[str], group: Group, stratified: bool) -> SplitPolicy | None:
    if not shares:
        if stratified or group is not Group.PICTURES:
            raise typer.BadParameter("--stratified and --group go with --split, such as --split train=0.8")
        return None
    fractions: dict[str, float] = {}
    for each in shares:
        name, _, share = each.partition("=")
        try:
            fractions[name] = float(share)
        except ValueError:
            raise typer.BadParameter(f"--split {each}: write a split and its share, such as train=0.8") from None
    key = GroupKey.Value(f"GROUP_KEY_{group.name}")
    return SplitPolicy(fractions=FractionSplits(fractions=fractions, group_key=key, stratified=stratified))


@contextmanager
def _bar() -> "Iterator[PushBar]":
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=screen.error_console(), transient=True) as progress:
            yield PushBar(progress)
    else:
        yield PushBar(None)


class PushBar:
    """Shows a push's phases, one bar each, where there is a terminal."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._phase = ""

    def __call__(self, done: PushProgress) -> None:
        """Takes the next figure."""
        if self._progress is None:
            return
        if done.phase != self._phase:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(done.phase, count="")
            self._phase = done.phase
        figures = (done.done, done.total) if done.total else (done.done,)
        count = "/".join(screen.size(each) if done.phase == "uploading" else f"{each:,}" for each in figures)
        self._progress.update(self._progress.task_ids[0], completed=done.done, total=done.total or None, count=count)


def _print_version(version: DatasetVersion) -> None:
    report = version.report
    refused = f", {report.refused_rows:,} refused" if report.refused_rows else ""
    screen.print_facts(
        [
            ("version", version.name.split("/")[1]),
            ("digest", version.digest),
            ("rows", f"{report.accepted_rows:,} accepted{refused}"),
            ("splits", ", ".join(f"{each.split} {each.row_count:,}" for each in version.splits)),
            ("pictures", f"{version.picture_count:,}, {screen.size(version.picture_size_bytes)}"),
            ("tokens", _tokens(version) if report.model else ""),
            ("files", ", ".join(f"{each.path} ({_dialect(each.dialect)})" for each in report.row_files)),
        ]
    )


def _tokens(version: DatasetVersion) -> str:
    sums = {kind: sum(getattr(each.tokens, kind) for each in version.splits) for kind in _TOKENS}
    every = ", ".join(f"{count:,} {kind}" for kind, count in sums.items())
    return f"{every}; {version.report.train_tokens_per_epoch:,} an epoch"


def _dialect(dialect: Dialect.ValueType) -> str:
    return Dialect.Name(dialect).removeprefix("DIALECT_").lower()


def _print_findings(findings: Iterable[Finding], limit: int = _SHOWN_FINDINGS) -> None:
    every = list(findings)
    for finding in every[:limit]:
        word, colour = _SEVERITIES.get(finding.severity, ("note", ""))
        place = f"{finding.path}:{finding.line}" if finding.line else finding.path
        expected = f", expected {finding.expected}" if finding.expected else ""
        text = Text.assemble(
            (f"{word} ", colour),
            (f"{place} {finding.json_path} ".replace("  ", " "), "bold"),
            f"{finding.code}: {finding.found}{expected}. {finding.remedy}",
        )
        screen.console().print(text)
    if len(every) > limit:
        print(f"and {len(every) - limit} more: veneer dataset show NAME")
