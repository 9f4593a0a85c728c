"""`veneer base verify`.

Owns what a person types and reads; the work is `verify`'s. Torch is imported when the command runs, not
before.
"""

import dataclasses
import enum
import importlib.util
import json as json_format
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # it imports torch
    from veneer_vlm.verify import Stage


class Dtype(enum.StrEnum):
    """Precisions the model can be verified in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def verify(
    model: Annotated[str, typer.Argument(help="A model directory, or a hub id that is in the hub's cache.")],
    dtype: Annotated[Dtype, typer.Option(help="Precision of both sides.")] = Dtype.FLOAT32,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda:0.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Compares a base with transformers, trains one step on it and lets it answer.

    Example:
        veneer base verify Qwen/Qwen3-VL-2B-Instruct --dtype bfloat16
    """
    if importlib.util.find_spec("transformers") is None:
        print("veneer: verify compares with transformers: pip install transformers", file=sys.stderr)
        raise typer.Exit(1)
    import torch

    from veneer_processing import ProcessingError
    from veneer_vlm.errors import RefusedError
    from veneer_vlm.verify import verify as run
    from veneer_vlm.weights import locate

    said: list[str] = []
    try:
        stages = run(locate(model), getattr(torch, dtype.value), torch.device(device), said.append if json else _say)
    except (RefusedError, ProcessingError) as error:
        print(f"veneer: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    if json:
        result = {"stages": [dataclasses.asdict(stage) for stage in stages], "answer": "".join(said)}
        print(json_format.dumps(result, ensure_ascii=False))
    else:
        _print_table(stages)
    if not all(stage.passed for stage in stages):
        raise typer.Exit(1)


def _print_table(stages: "Sequence[Stage]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "time", "peak memory", "saw")
    for stage in stages:
        style = None if stage.passed else "bold red"
        memory = f"{stage.peak_bytes / 2**20:,.0f} MiB"
        table.add_row(stage.name, f"{stage.seconds:.1f} s", memory, "\n".join(stage.findings), style=style)
    print()
    Console().print(table)


def _say(text: str) -> None:
    print(text, end="", flush=True)
