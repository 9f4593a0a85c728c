"""`veneer base verify`.

Owns what a person types and reads; the work is `verify`'s. Torch is imported when the command runs, not
before.
"""

import enum
import importlib.util
import sys
from typing import Annotated

import typer


class Dtype(enum.StrEnum):
    """Precisions the model can be verified in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def verify(
    model: Annotated[str, typer.Argument(help="A model directory, or a hub id that is in the hub's cache.")],
    dtype: Annotated[Dtype, typer.Option(help="Precision of both sides.")] = Dtype.FLOAT32,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda:0.")] = "cpu",
) -> None:
    """Compare a base with transformers, train one step on it and let it answer."""
    if importlib.util.find_spec("transformers") is None:
        print("veneer: verify compares with transformers: pip install transformers", file=sys.stderr)
        raise typer.Exit(1)
    import torch
    from rich.console import Console
    from rich.table import Table

    from veneer_processing import ProcessingError
    from veneer_vlm.errors import RefusedError
    from veneer_vlm.verify import verify as run
    from veneer_vlm.weights import locate

    try:
        stages = run(locate(model), getattr(torch, dtype.value), torch.device(device), _say)
    except (RefusedError, ProcessingError) as error:
        print(f"veneer: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    table = Table("stage", "time", "peak memory", "saw")
    for stage in stages:
        style = None if stage.passed else "bold red"
        memory = f"{stage.peak_bytes / 2**20:,.0f} MiB"
        table.add_row(stage.name, f"{stage.seconds:.1f} s", memory, "\n".join(stage.findings), style=style)
    print()
    Console().print(table)
    if not all(stage.passed for stage in stages):
        raise typer.Exit(1)


def _say(text: str) -> None:
    print(text, end="", flush=True)
