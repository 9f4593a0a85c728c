"""`veneer serve`: a certified folder answers without trainer and dataset; a changed one is never served."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from veneer.dataset.v1 import conversation_pb2
from veneer.inference.v1 import inference_pb2
from veneer.inference.v1 import inference_service_pb2 as pb
from veneer.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from veneer_base.random_weights import write_random_model
from veneer_digests import model_digest
from veneer_inference.settings import InferenceSettings
from veneer_rpc.certificate import CERTIFICATE_FILE, SIGNER_FILE, CertificateSigner, verify
from veneer_rpc.delegation import new_key_pair
from veneer_rpc.settings import SettingsError
from veneer_rpc.tokens import add_token

pytestmark = pytest.mark.timeout(180)
COMMAND = [sys.executable, "-c", "import typer, veneer_inference.cli as cli; typer.run(cli.serve)"]


def certify(folder: Path) -> None:
    signer = CertificateSigner(new_key_pair()[0])
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / CERTIFICATE_FILE).write_bytes(signer.sign(digests, {}))
    (folder / SIGNER_FILE).write_bytes(signer.public_key_pem)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "Digits Merged"
    write_random_model("tiny", folder, dtype=torch.float32)
    certify(folder)
    return folder


@pytest.fixture(scope="module")
def serving(export: Path) -> Iterator[tuple[str, str]]:
    """The address of a service, and its token."""
    command = [*COMMAND, str(export), "--bind", "127.0.0.1:0", "--threads", "1", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    assert (told["model"], told["key_id"]) == ("models/digits-merged", verify(export).key_id)
    yield told["address"], told["token"]
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    process.stdout.close()
    assert process.wait(30) == 0


def ask(serving: tuple[str, str], part: conversation_pb2.Part, model: str = "") -> pb.GenerateResponse:
    address, token = serving
    message = conversation_pb2.Message(role=conversation_pb2.ROLE_USER, parts=[part])
    request = pb.GenerateRequest(
        model=model,
        prompt=inference_pb2.Prompt(messages=[message]),
        sampling=inference_pb2.SamplingParams(max_tokens=3, temperature=0.0),
    )
    with grpc.insecure_channel(address) as channel:
        metadata = (("authorization", f"Bearer {token}"),)
        return InferenceServiceStub(channel).Generate(request, metadata=metadata, timeout=60)


def test_an_export_answers_alone_and_says_what_it_lacks(serving: tuple[str, str], export: Path) -> None:
    text = conversation_pb2.Part(text="Hello")
    named = conversation_pb2.Part(picture=conversation_pb2.Picture(blob="ab" * 32))
    answer = ask(serving, text, "models/digits-merged")
    assert answer.served_by.model == "models/digits-merged"
    assert answer.served_by.model_digest == model_digest(export)
    assert len(answer.token_ids) >= 1
    for model, part, problem in (
        ("adapters/digits", text, "without adapters"),
        ("adapters/digits/versions/3", text, "without adapters"),
        ("models/digits-merged", named, "without a dataset"),
    ):
        with pytest.raises(grpc.RpcError, match=problem):
            ask(serving, part, model)
    with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
        ask((serving[0], "vnr_wrong"), text)


def test_what_was_tampered_with_is_never_served(export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in export.iterdir():
        os.link(path, copy / path.name)
    (copy / "config.json").unlink()
    (copy / "config.json").write_bytes((export / "config.json").read_bytes() + b" ")
    ended = subprocess.run([*COMMAND, str(copy), "--bind", "127.0.0.1:0"], capture_output=True, text=True, timeout=90)
    assert ended.returncode == 1
    assert "config.json has SHA-256" in ended.stderr
    assert "listening" not in ended.stdout


def test_a_replica_has_trainer_and_dataset_or_is_alone(export: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    add_token(tokens, "acme", ["user"])
    values = {"tokens_file": tokens, "data": tmp_path, "replica": "r", "models": f"tiny={export}"}
    with pytest.raises(SettingsError, match="trainer: must be given without alone\ndataset: must be given without"):
        InferenceSettings(**values)
    with pytest.raises(SettingsError, match="trainer: must not be given with alone"):
        InferenceSettings(**values, alone=True, trainer="127.0.0.1:1", dataset="127.0.0.1:2")
    assert InferenceSettings(**values, alone=True).trainer is None
