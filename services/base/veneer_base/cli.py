"""The commands `veneer base ...` and `veneer dataset synth`.

Owns arguments and what is printed. Nothing heavy is imported before a command runs.
"""

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def path(json: Json = False) -> None:
    """Prints the folder of the base, unfolding it on first use.

    Example:
        veneer base path
    """
    from veneer_base.unfold import base_directory

    directory = str(base_directory())
    _print({"path": directory}, directory, json)


def random(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    shape: Annotated[str, typer.Option(help="qwen3-vl-2b, or tiny for tests.")] = "qwen3-vl-2b",
    seed: Annotated[int, typer.Option(help="Of every weight.")] = 0,
    json: Json = False,
) -> None:
    """Writes random bf16 weights of a full shape, for work on speed and memory.

    Example:
        veneer base random --shape tiny --out /tmp/tiny
    """
    from veneer_base.random_weights import write_random_model

    try:
        parameters = write_random_model(shape, out, seed=seed)
    except (ValueError, FileExistsError) as error:
        raise typer.BadParameter(str(error)) from error
    _print({"path": str(out), "parameters": parameters}, f"{parameters:,} parameters in {out}", json)


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the log and the compact weights.")],
    seed: Annotated[int, typer.Option(help="Of weights and pages.")] = 0,
    processes: Annotated[int, typer.Option(help="One thread each; each takes its share of a batch.")] = 2,
    json: Json = False,
) -> None:
    """Trains the base from nothing, or goes on from the checkpoint in the folder. Tells its steps as lines of JSON.

    Example:
        veneer base train --out build/base
    """
    from veneer_base.compact import write_compact
    from veneer_base.train import train as run

    run(out, seed=seed, processes=processes)
    digests = write_compact(out / "checkpoint.safetensors", out / "weights")
    text = "\n".join(f"{digest}  weights/{name}" for name, digest in digests.items())
    _print({"path": str(out / "weights"), "digests": digests}, text, json)


def evaluate(
    model: Annotated[Path | None, typer.Option(help="A Qwen3-VL folder instead of the base.")] = None,
    count: Annotated[int, typer.Option(help="Examples for each cell of the table.")] = 100,
    json: Json = False,
) -> None:
    """Prints how well the base reads.

    Example:
        veneer base eval --count 40
    """
    from veneer_base.evaluate import Reader, scores, table
    from veneer_base.unfold import base_directory

    found = scores(Reader.of_directory(model or base_directory()), count)
    _print(found, table(found), json)


def synth(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    kind: Annotated[list[str] | None, typer.Option(help="invoice, receipt, leave; all of them by default.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="zh, en; both by default.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of training; each other split has a tenth, 20 at least.")] = 1000,
    answer: Annotated[str, typer.Option(help="sentence or json.")] = "sentence",
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    json: Json = False,
) -> None:
    """Writes a dataset of rendered office documents, with a layout and fonts held out as splits of their own.

    Example:
        veneer dataset synth --kind invoice --rows 200 --out invoices
    """
    from veneer_base import documents
    from veneer_base.synth import write_dataset

    try:
        counts = write_dataset(
            out,
            rows=rows,
            kinds=tuple(kind or documents.KINDS),
            languages=tuple(language or documents.LANGUAGES),
            answer=answer,
            seed=seed,
        )
    except (ValueError, FileExistsError) as error:
        raise typer.BadParameter(str(error)) from error
    text = "\n".join(f"{out / split}.jsonl  {count} rows" for split, count in counts.items())
    _print({"path": str(out), "rows": counts}, text, json)


def _print(value: object, text: str, json: bool) -> None:
    typer.echo(json_format.dumps(value, ensure_ascii=False) if json else text)
