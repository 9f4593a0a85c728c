"""Options that several commands share, and the client that they lead to."""

from pathlib import Path
from typing import Annotated

import typer

from veneer_client import Client

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs: fields as the contract names them.")]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        help="Folder of a cluster on this machine. Default: VENEER_DIR, else the usual one.",
    ),
]


def connect(directory: Path | None) -> Client:
    """Returns a client of the cluster that the options, the environment or the default folder name."""
    return Client(directory=directory)
