"""`python -m veneer_cluster` is `veneer up`; a detached cluster is started so."""

import sys

import typer

from veneer_client import VeneerError
from veneer_cluster.commands import up


def main() -> None:
    """Runs the launcher in the foreground."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(up)
    try:
        app()
    except VeneerError as error:
        print(f"veneer: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
