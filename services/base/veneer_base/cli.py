"""The commands `veneer base ...` and `veneer dataset synth`.

Owns arguments and what is printed. Nothing heavy is imported before a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer


def path() -> None:
    """Print the folder of the base, unfolding it on first use."""
    from veneer_base.unfold import base_directory

    typer.echo(base_directory())


def random(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    shape: Annotated[str, typer.Option(help="qwen3-vl-2b, or tiny for tests.")] = "qwen3-vl-2b",
    seed: Annotated[int, typer.Option(help="Of every weight.")] = 0,
) -> None:
    """Write random bf16 weights of a full shape, for work on speed and memory."""
    from veneer_base.random_weights import write_random_model

    try:
        parameters = write_random_model(shape, out, seed=seed)
    except (ValueError, FileExistsError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{parameters:,} parameters in {out}")


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the log and the compact weights.")],
    seed: Annotated[int, typer.Option(help="Of weights and pages.")] = 0,
    processes: Annotated[int, typer.Option(help="One thread each; each takes its share of a batch.")] = 2,
) -> None:
    """Train the base from nothing, or go on from the checkpoint in the folder."""
    from veneer_base.compact import write_compact
    from veneer_base.train import train as run

    run(out, seed=seed, processes=processes)
    for name, digest in write_compact(out / "checkpoint.safetensors", out / "weights").items():
        typer.echo(f"{digest}  weights/{name}")


def evaluate(
    model: Annotated[Path | None, typer.Option(help="A Qwen3-VL folder instead of the base.")] = None,
    count: Annotated[int, typer.Option(help="Examples for each cell of the tables.")] = 100,
) -> None:
    """Print how well the base reads."""
    from veneer_base.evaluate import Reader, tables
    from veneer_base.unfold import base_directory

    typer.echo(tables(Reader.of_directory(model or base_directory()), count))


def synth(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    kind: Annotated[list[str] | None, typer.Option(help="invoice, receipt, leave; all of them by default.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="zh, en; both by default.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of training; each other split has a tenth, 20 at least.")] = 1000,
    answer: Annotated[str, typer.Option(help="sentence or json.")] = "sentence",
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
) -> None:
    """Write a dataset of rendered office documents, with a layout and fonts held out as splits of their own."""
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
    for split, count in counts.items():
        typer.echo(f"{out / split}.jsonl  {count} rows")
