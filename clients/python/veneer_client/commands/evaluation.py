"""`veneer eval`: asking a split, and looking at what came of it."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from veneer.dataset.v1.dataset_service_pb2 import PICTURE_FORM_RESIZED
from veneer.trainer.v1.evaluation_pb2 import Evaluation, Metric, Sample
from veneer_client import AsyncClient, NotFound, succeeded
from veneer_client._comparison import Comparison, Difference
from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.evaluation_page import Pictures, page
from veneer_client.commands.options import Directory, Json, connect
from veneer_client.commands.pictures import THUMBNAIL_PIXELS, thumbnails
from veneer_client.commands.watching import watch_evaluation

_SHOWN_MISSES = 5
_SHOWN_CHARS = 60
METRICS = ("exact_match", "field_match", "field_f1", "cer", "anls", "rouge_l")


def evaluate(
    dataset: Annotated[str, typer.Option(help="digits for the newest version, digits@<digest> for another.")],
    adapter: Annotated[str | None, typer.Option(help="Who answers: digits, digits@3. Default: the base.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, where no adapter is named.")] = None,
    split: Annotated[str, typer.Option(help="The rows to ask.")] = "test",
    prompt: Annotated[str, typer.Option(help="Replaces each row's question.")] = "",
    max_samples: Annotated[int, typer.Option(min=0, help="Rows to ask at most; 0 asks all.")] = 0,
    metric: Annotated[list[str] | None, typer.Option(help=f"{', '.join(METRICS)}; may be repeated.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Queue it and return at once.")] = False,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Asks the rows of a split and compares the answers with the expected ones.

    `veneer eval list`, `compare` and `report` look at what came of it.

    Example:
        veneer eval --adapter digits --dataset digits --split test --metric exact_match --metric cer
    """
    with connect(directory) as client:
        evaluation = client.evaluations.create(
            dataset,
            adapter=adapter,
            model=model,
            split=split,
            prompt=prompt,
            max_samples=max_samples,
            metrics=metric or (),
        )
        if no_wait:
            screen.print_json(screen.as_json(evaluation)) if json else print(f"{evaluation.name} queued")
            return
        evaluation = succeeded(watch_evaluation(client, evaluation.name, json))
        if json:
            return
        misses = client.evaluations.samples(evaluation.name, only_misses=True)
        shown = list(itertools.islice(misses, _SHOWN_MISSES))
    print(f"{short(evaluation.spec.subject)} on {split} of {short(evaluation.spec.dataset_version)}")
    print_metrics(evaluation.metrics)
    if shown:
        misses_shown = [(str(miss.index), miss.expected, miss.answer or miss.failure.message) for miss in shown]
        screen.print_table((">ROW", "EXPECTED", "ANSWERED"), misses_shown, "")


def list_evaluations(
    adapter: Annotated[str, typer.Option(help="Only those of a version, such as digits@3.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Lists evaluations, newest first.

    Example:
        veneer eval list --adapter digits@3
    """
    with connect(directory) as client:
        subject = client.adapters.get_version(adapter).name if adapter else ""
        found = list(itertools.islice(client.evaluations.list(subject=subject), limit))
    if json:
        screen.print_messages(found)
        return
    rows = [
        (
            short(each.name),
            screen.state(each.state),
            short(each.spec.subject),
            f"{short(each.spec.dataset_version)} {each.spec.split}",
            ", ".join(f"{metric.metric} {figure(metric)}" for metric in each.metrics if "/" not in metric.metric),
            screen.time(each.create_time),
        )
        for each in found
    ]
    columns = ("EVALUATION", "STATE", "ANSWERED", "ASKED", "FIGURES", "CREATED")
    screen.print_table(columns, rows, "no evaluations yet: veneer eval --dataset NAME")


def compare(
    before: Annotated[str, typer.Argument(help="The earlier evaluation, or who answered it, such as digits@3.")],
    after: Annotated[str, typer.Argument(help="The later one, likewise.")],
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Compares two evaluations row by row, and says whether each difference is larger than chance.

    Example:
        veneer eval compare digits@3 digits@4
    """
    with connect(directory) as client:
        found = client.evaluations.compare(before, after)
    if json:
        screen.print_json(comparison_json(found))
        return
    print(f"{_named(found.before)} -> {_named(found.after)}, {len(found.pairs):,} rows of both")
    print_differences(found.differences)
    changed = [(old, new) for old, new in found.pairs if old.answer != new.answer and _hit(old) != _hit(new)]
    rows = [
        (
            str(new.index),
            "+" if _hit(new) else "-",
            *(Text(_cut(text)) for text in (new.expected, old.answer, new.answer)),
        )
        for old, new in changed[:_SHOWN_MISSES]
    ]
    if rows:
        screen.print_table((">ROW", "", "EXPECTED", "BEFORE", "AFTER"), rows, "")


def report(
    evaluation: Annotated[str, typer.Argument(help="The evaluation, such as evaluation-5b0c…")],
    html: Annotated[Path, typer.Option("--html", help="Write the page to this file.")],
    against: Annotated[str, typer.Option(help="Another evaluation, shown beside it.")] = "",
    samples: Annotated[int, typer.Option(min=1, max=2000, help="So many with their pictures, misses first.")] = 200,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Writes one self-contained page: figures, plots, and each sample's picture, expected text and answer.

    Example:
        veneer eval report evaluation-5b0c… --html digits.html
    """
    made, shown = asyncio.run(_report(evaluation, against, samples, directory))
    html.write_text(made, "utf-8")
    facts = {"file": str(html), "samples": shown, "size_bytes": html.stat().st_size}
    screen.print_json(facts) if json else print(f"{shown} samples are in {html}, {screen.size(html.stat().st_size)}")


async def _report(name: str, against: str, most: int, directory: Path | None) -> tuple[str, int]:
    async with AsyncClient(directory=directory) as client:
        evaluation = await client.evaluations.get(name)
        samples = [each async for each in client.evaluations.samples(name)]
        comparison = await client.evaluations.compare(against, name) if against else None
        shown = sorted(samples, key=lambda each: (_hit(each), each.index))[:most]
        pictures = await _pictures(client, evaluation, shown)
    return page(evaluation, samples, shown, pictures, comparison), len(shown)


async def _pictures(client: AsyncClient, evaluation: Evaluation, shown: Sequence[Sample]) -> Pictures:
    """Small pictures by sample; none where the data is gone, which the samples outlast."""
    wanted = {each.index for each in shown if each.picture_blobs}
    if not wanted:
        return {}
    spec, found = evaluation.spec, dict[int, Sequence[str]]()
    try:
        model = await anext((each.name async for each in client.models.list()), "")
        rows = client.datasets.examples(
            spec.dataset_version,
            spec.split,
            seed=0,  # the order that evaluations ask in
            limit=max(wanted) + 1,
            picture_form=PICTURE_FORM_RESIZED,
            model=model,
            max_pixels=THUMBNAIL_PIXELS,
        )
        async for row in rows:
            if row.index in wanted:
                found[row.index] = thumbnails(row)
    except NotFound:
        return {}
    return found


def print_metrics(metrics: Sequence[Metric]) -> None:
    """Prints figures with their intervals."""
    rows = [
        (each.metric, figure(each), f"{100 * each.low:.1f}-{100 * each.high:.1f}", f"{each.count:,}")
        for each in metrics
    ]
    screen.print_table(("METRIC", ">VALUE", ">95 % INTERVAL", ">OVER"), rows, "no figures")


def print_differences(differences: Sequence[Difference]) -> None:
    """Prints what each metric gained."""
    rows = [
        (
            each.metric,
            f"{100 * each.before:.1f} %",
            f"{100 * each.after:.1f} %",
            f"{100 * each.difference:+.1f}",
            f"{100 * each.low:+.1f} to {100 * each.high:+.1f}",
            f"{each.only_after} / {each.only_before}",
            f"{each.p_value:.3g} ({each.test})",
            Text(each.verdict, style={"better": "green", "worse": "red"}.get(each.verdict, "")),
        )
        for each in differences
    ]
    columns = ("METRIC", ">BEFORE", ">AFTER", ">DIFFERENCE", ">95 % INTERVAL", ">ROWS UP / DOWN", ">P", "")
    screen.print_table(columns, rows, "no metric in common")


def comparison_json(found: Comparison) -> dict[str, object]:
    """A comparison for programs."""
    return {
        "before": screen.as_json(found.before),
        "after": screen.as_json(found.after),
        "rows": len(found.pairs),
        "differences": [
            {
                name: getattr(each, name)
                for name in (
                    *("metric", "before", "after", "difference", "low", "high", "p_value", "test"),
                    *("only_before", "only_after", "larger_than_chance", "verdict"),
                )
            }
            for each in found.differences
        ],
    }


def figure(metric: Metric) -> str:
    """A figure as people read it."""
    return f"{100 * metric.value:.1f} %"


def _named(evaluation: Evaluation) -> str:
    return f"{short(evaluation.spec.subject)} ({short(evaluation.name)})"


def _hit(sample: Sample) -> bool:
    return not sample.HasField("failure") and sample.answer == sample.expected


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS else f"{line[: _SHOWN_CHARS - 1]}…"
