"""`veneer verify`: an export held against its certificate, without a network."""

import json as json_text
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer_rpc.certificate import CertificateError, Certified
from veneer_rpc.certificate import verify as check


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export.")],
    key: Annotated[
        Path | None,
        typer.Option(help="PEM of the public key that must have signed it. Default: the folder's own, signer.pem."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Checks that an export is whole and as its certificate says; exits with 1 where it is not.

    Without --key the signature shows that nothing was changed since it was signed, not who signed.

    Example:
        veneer verify ./digits-merged --key trainer-export.pem
    """
    try:
        found = check(folder, None if key is None else key.read_bytes())
    except CertificateError as error:
        if json:
            print(json_text.dumps({"holds": False, "problems": error.problems}, ensure_ascii=False))
        else:
            print("\n".join(f"veneer: {problem}" for problem in error.problems), file=sys.stderr)
        raise typer.Exit(1) from error
    except OSError as error:
        print(f"veneer: {error.filename}: {error.strerror}", file=sys.stderr)
        raise typer.Exit(1) from error
    if json:
        values = {
            "holds": True,
            "key_id": found.key_id,
            "trusted": found.trusted,
            "files": found.digests,
            "predicate": found.predicate,
        }
        print(json_text.dumps(values, ensure_ascii=False))
        return
    print("\n".join(_lines(folder, found)))


def _lines(folder: Path, found: Certified) -> list[str]:
    signer = "which is the given key" if found.trusted else "from the folder itself: give --key to know whose it is"
    lines = [f"{folder}: {len(found.digests)} files are as certified", f"signed by key {found.key_id}, {signer}"]
    return [*lines, *_facts(found.predicate, "")]


def _facts(value: dict[str, Any], prefix: str) -> list[str]:
    lines = []
    for name, each in value.items():
        if isinstance(each, dict):
            lines += _facts(each, f"{prefix}{name}.")
        else:
            lines.append(f"  {prefix}{name}: {each if isinstance(each, str) else json_text.dumps(each)}")
    return lines
