"""The Node program, run as a user runs it, against a cluster that speaks the contract."""

# ruff: noqa: ANN401  # the fake's types stay in conftest

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer_client import Client

NODE = Path(__file__).parents[3] / "clients" / "node"
Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed"),
    pytest.mark.skipif(
        not (NODE / "node_modules").is_dir(), reason="run `npm ci` in clients/node: its packages are missing"
    ),
]


@pytest.fixture
def node(running: Any) -> Run:
    where = running.where()
    environment = {
        **os.environ,
        "VENEER_DATASET": where["dataset"],
        "VENEER_TRAINER": where["trainer"],
        "VENEER_INFERENCE": ",".join(where["inference"]),
        "VENEER_TOKEN": where["token"],
    }

    def run(*words: object, **variables: str) -> "subprocess.CompletedProcess[str]":
        command = ["node", NODE / "veneer.mjs", *map(str, words)]
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def test_it_uploads_trains_and_streams(node: Run, client: Client, folder: Path, cluster: Any) -> None:
    (folder / "images" / "large.png").write_bytes(bytes(range(256)) * 10_000)  # three pieces
    pushed = node("push", folder, "digits")
    assert (pushed.returncode, pushed.stderr) == (0, "")
    version = client.datasets.get_version("digits")
    assert pushed.stdout == f"{version.digest} 4 rows accepted, 0 refused\n"
    assert version.picture_count == 5
    trained = node("train", "digits", "digits", 5)
    assert trained.stdout.splitlines()[-1] == "adapters/digits/versions/1"
    assert "step 1/5 loss 2" in trained.stdout
    assert cluster.requests["CreateTrainingJob"][0].training_job.spec.epochs == 5
    asked = node("ask", "adapters/digits", folder / "images" / "0.png", "哪个数字?")
    assert asked.stdout == "adapters/digits saw 1 and read '哪个数字?'\n"


def test_what_is_there_is_not_sent_again(node: Run, folder: Path, cluster: Any) -> None:
    node("push", folder, "digits")
    sent = len(cluster.requests["UploadBlobs"])
    assert node("push", folder, "digits").returncode == 0
    assert len(cluster.requests["UploadBlobs"]) == sent == 7


def test_an_error_info_is_read_from_the_details(node: Run, folder: Path) -> None:
    refused = node("push", folder, "digits", VENEER_TOKEN="vnr_other")
    assert refused.returncode == 1
    assert refused.stderr == "UNAUTHENTICATED TOKEN_UNKNOWN: unknown token\n"
    for path in (folder / "images").iterdir():
        path.unlink()
    refused = node("push", folder, "digits")
    assert refused.stderr == "FAILED_PRECONDITION ROWS_REFUSED: 4 of 4 rows were refused\n"


def test_called_wrongly(node: Run) -> None:
    called = node("ask", "adapters/digits")
    assert called.returncode == 2
    assert called.stderr.startswith("usage: node veneer.mjs push DIR NAME")
