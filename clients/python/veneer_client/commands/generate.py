"""`veneer generate`."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from veneer_client import AsyncClient, Batch
from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.options import Directory, Json
from veneer_client.commands.watching import LINE_INTERVAL_S, leaving


def generate(
    dataset: Annotated[str, typer.Option(help="digits for the newest version, digits@<digest> for another.")],
    out: Annotated[Path, typer.Option(help="Gets one JSON object a line; a run that was cut off goes on with it.")],
    adapter: Annotated[str | None, typer.Option(help="Who answers: digits, digits@3. Default: the base.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, where no adapter is named.")] = None,
    split: Annotated[str, typer.Option(help="The rows to ask.")] = "test",
    prompt: Annotated[str, typer.Option(help="Replaces each row's question.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    in_flight: Annotated[int, typer.Option(min=1, max=1024, help="Rows that are asked at once.")] = 64,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Answers every row of a split into a file. Called again it asks only what has no answer yet.

    The version that answers is pinned at the start. Exits with 1 where rows stay without an answer.

    Example:
        veneer generate --dataset forms --split test --adapter forms --out answers.jsonl
    """
    began_s = shown_s = time.monotonic()

    def show(batch: Batch) -> None:
        nonlocal shown_s
        if not json and time.monotonic() - shown_s >= LINE_INTERVAL_S:
            shown_s = time.monotonic()
            print(f"{len(batch.done):,}/{batch.rows:,} answered", file=sys.stderr, flush=True)

    async def run() -> Batch:
        async with AsyncClient(directory=directory) as client:
            return await client.generate_split(
                dataset,
                out,
                adapter=adapter,
                model=model,
                split=split,
                prompt=prompt,
                max_tokens=max_tokens,
                in_flight=in_flight,
                on_progress=show,
            )

    with leaving(f"what was answered is in {out}; the same command goes on with it"):
        batch = asyncio.run(run())
    facts = {"file": str(out), "rows": batch.rows, "answered": len(batch.done), "failed": batch.failed}
    if json:
        screen.print_json(facts | {"asked": batch.asked})
    else:
        took = screen.duration(time.monotonic() - began_s)
        who = short(batch.asked["answered_by"])
        print(f"{who} has answered {len(batch.done):,} of {batch.rows:,} rows in {out}, this run took {took}")
    if batch.failed:
        raise typer.Exit(1)
