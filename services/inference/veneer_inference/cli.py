"""`veneer serve`: the inference service on an export alone."""

import asyncio
import json as json_text
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from veneer_inference.__main__ import listening
from veneer_inference.__main__ import serve as run
from veneer_inference.ports import EngineError
from veneer_inference.settings import InferenceSettings
from veneer_processing import ProcessingError
from veneer_rpc import logs
from veneer_rpc.certificate import CertificateError, verify
from veneer_rpc.server import BindError
from veneer_rpc.settings import SettingsError, load
from veneer_rpc.tokens import add_token

_ENVIRONMENT = "VENEER_SERVE_"
_TENANT = "local"


def serve(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT_DIR", help="What `veneer adapters export` wrote.")],
    bind: Annotated[str, typer.Option(help="host:port or unix:/path to listen on.")] = "127.0.0.1:7443",
    key: Annotated[
        Path | None, typer.Option(help="PEM of the public key that must have signed it. Default: the folder's own.")
    ] = None,
    tokens_file: Annotated[
        Path | None, typer.Option(help="Who may call, as a service's tokens file. Default: a token made now.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads to compute with; 0: as many as cores.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print address, model, token and key as JSON.")] = False,
) -> None:
    """Serves an export without trainer and dataset, until Ctrl-C; refuses one that its certificate does not fit.

    Example:
        veneer serve ./digits-merged --bind 127.0.0.1:7443
    """
    try:
        certified = verify(folder, None if key is None else key.read_bytes())
        with tempfile.TemporaryDirectory(prefix="veneer-serve-") as data:
            token = ""
            if tokens_file is None:
                tokens_file = Path(data) / "tokens.json"
                token = add_token(tokens_file, _TENANT, ["user"])
            model = _model_name(folder)

            def announce(address: str) -> None:
                facts = {"address": address, "model": f"models/{model}", "token": token, "key_id": certified.key_id}
                text = [f"{folder} is as certified by key {certified.key_id}"]
                text += [f"model models/{model}"] + ([f"token {token}"] if token else [])
                print(json_text.dumps(facts) if json else "\n".join(text), flush=True)
                if not json:
                    listening(address)

            values = {
                "bind": bind,
                "tokens-file": tokens_file,
                "data": data,
                "replica": "serve",
                "models": f"{model}={folder}",
                "alone": "true",
                "threads": threads,
                "dtype": _dtype(folder),
            }
            arguments = [text for name, value in values.items() for text in (f"--{name}", str(value))]
            settings = load(InferenceSettings, _ENVIRONMENT, arguments, os.environ)
            logs.configure(settings.log_level, settings.log_format)
            asyncio.run(run(settings, announce))
    except CertificateError as error:
        print("\n".join(f"veneer: {problem}" for problem in error.problems), file=sys.stderr)
        raise typer.Exit(1) from error
    except (SettingsError, BindError, EngineError, ProcessingError, OSError) as error:
        print(f"veneer: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def _model_name(folder: Path) -> str:
    """The folder's name as an id, which requests may name as `models/{id}`."""
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")
    return name if re.match(r"[a-z]", name) else f"export-{name}".rstrip("-")


def _dtype(folder: Path) -> str:
    """How the weights were written; graphs take and give float32."""
    config = json_text.loads((folder / "config.json").read_bytes())
    return "bfloat16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "float32"
