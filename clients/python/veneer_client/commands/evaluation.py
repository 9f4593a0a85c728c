"""`veneer eval`."""

import itertools
from typing import Annotated

import typer

from veneer_client import succeeded
from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.options import Directory, Json, connect
from veneer_client.commands.watching import watch_evaluation

_SHOWN_MISSES = 5


def evaluate(
    dataset: Annotated[str, typer.Option(help="digits for the newest version, digits@<digest> for another.")],
    adapter: Annotated[str | None, typer.Option(help="Who answers: digits, digits@3. Default: the base.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, where no adapter is named.")] = None,
    split: Annotated[str, typer.Option(help="The rows to ask.")] = "test",
    prompt: Annotated[str, typer.Option(help="Replaces each row's question.")] = "",
    max_samples: Annotated[int, typer.Option(min=0, help="Rows to ask at most; 0 asks all.")] = 0,
    metric: Annotated[list[str] | None, typer.Option(help="Such as exact_match; may be repeated.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Queue it and return at once.")] = False,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Asks the rows of a split and compares the answers with the expected ones.

    Example:
        veneer eval --adapter digits --dataset digits --split test
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
    rows = [
        (
            each.metric,
            f"{100 * each.value:.1f} %",
            f"{100 * each.low:.1f}-{100 * each.high:.1f}",
            f"{each.count:,}",
        )
        for each in evaluation.metrics
    ]
    print(f"{short(evaluation.spec.subject)} on {split} of {short(evaluation.spec.dataset_version)}")
    screen.print_table(("METRIC", ">VALUE", ">95 % INTERVAL", ">OVER"), rows, "no figures")
    if shown:
        misses_shown = [(str(miss.index), miss.expected, miss.answer or miss.failure.message) for miss in shown]
        screen.print_table((">ROW", "EXPECTED", "ANSWERED"), misses_shown, "")
