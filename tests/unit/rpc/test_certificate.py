"""Certificates: what is changed in a folder or an envelope is found out, and the signer's key is named."""

import base64
import json
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from typer.testing import CliRunner

from veneer_client.cli import build_app
from veneer_rpc import certificate
from veneer_rpc.certificate import CERTIFICATE_FILE, SIGNER_FILE, CertificateError, CertificateSigner, verify
from veneer_rpc.delegation import new_key_pair

FILES = {"config.json": b"{}", "part/weights.bin": b"\0" * 1000}


@pytest.fixture
def signer() -> CertificateSigner:
    return CertificateSigner(new_key_pair()[0])


@pytest.fixture
def export(tmp_path: Path, signer: CertificateSigner) -> Path:
    folder = tmp_path / "export"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    digests = {path: sha256(data).hexdigest() for path, data in FILES.items()}
    (folder / CERTIFICATE_FILE).write_bytes(signer.sign(digests, {"format": "merged", "check": {"prompts": 100}}))
    (folder / SIGNER_FILE).write_bytes(signer.public_key_pem)
    return folder


def test_a_whole_folder_verifies_with_and_without_the_signers_key(export: Path, signer: CertificateSigner) -> None:
    own, given = verify(export), verify(export, signer.public_key_pem)
    assert (own.trusted, given.trusted) == (False, True)
    assert own.key_id == given.key_id == json.loads((export / CERTIFICATE_FILE).read_bytes())["signatures"][0]["keyid"]
    assert own.digests.keys() == FILES.keys()
    assert own.predicate == {"format": "merged", "check": {"prompts": 100}}


def _change_statement(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    envelope = json.loads((folder / CERTIFICATE_FILE).read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (folder / CERTIFICATE_FILE).write_text(json.dumps(envelope))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (lambda folder: _flip(folder / "part/weights.bin"), "weights.bin has SHA-256"),
    "a file cut short": (lambda folder: (folder / "part/weights.bin").write_bytes(b"\0" * 999), "has SHA-256"),
    "a file that is gone": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "a file more": (lambda folder: (folder / "more.py").write_text(""), "more.py is not in the certificate"),
    "a file more, named as the certificate": (
        lambda folder: (folder / "part" / CERTIFICATE_FILE).write_text(""),
        "part/certificate.json is not in the certificate",
    ),
    "a link more": (lambda folder: (folder / "link").symlink_to(folder / "part"), "link is not in the certificate"),
    "another figure": (
        lambda folder: _change_statement(folder, lambda each: each.update(predicate={"prompts": 1000})),
        "does not hold",
    ),
    "no signature": (
        lambda folder: (folder / CERTIFICATE_FILE).write_text(
            json.dumps(json.loads((folder / CERTIFICATE_FILE).read_bytes()) | {"signatures": []})
        ),
        "signed by key nobody",
    ),
    "another type": (
        lambda folder: (folder / CERTIFICATE_FILE).write_text(
            json.dumps(json.loads((folder / CERTIFICATE_FILE).read_bytes()) | {"payloadType": "text/plain"})
        ),
        "text/plain",
    ),
    "no envelope": (lambda folder: (folder / CERTIFICATE_FILE).write_text("[]"), "no JSON object"),
    "half an envelope": (
        lambda folder: (folder / CERTIFICATE_FILE).write_bytes((folder / CERTIFICATE_FILE).read_bytes()[:-40]),
        "no JSON",
    ),
    "no certificate": (lambda folder: (folder / CERTIFICATE_FILE).unlink(), "certificate.json: No such file"),
    "another signer's key": (
        lambda folder: (folder / SIGNER_FILE).write_bytes(CertificateSigner(new_key_pair()[0]).public_key_pem),
        "not by",
    ),
    "no key": (lambda folder: (folder / SIGNER_FILE).write_text("secret"), "export: "),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_what_was_changed_is_found_out(export: Path, name: str) -> None:
    tamper, problem = TAMPERING[name]
    tamper(export)
    with pytest.raises(CertificateError) as caught:
        verify(export)
    assert problem in str(caught.value)


def test_the_signature_is_over_dsses_encoding(export: Path, signer: CertificateSigner) -> None:
    """As any tool for DSSE envelopes checks it, and not over the payload alone."""
    envelope = json.loads((export / CERTIFICATE_FILE).read_bytes())
    payload, kind = base64.b64decode(envelope["payload"]), b"application/vnd.in-toto+json"
    assert envelope["payloadType"].encode() == kind
    key = load_pem_public_key(signer.public_key_pem)
    assert isinstance(key, Ed25519PublicKey)
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)


@pytest.mark.parametrize("constant", ["STATEMENT_TYPE", "PREDICATE_TYPE"])
def test_what_the_trainer_signed_as_something_else_certifies_nothing(
    export: Path, signer: CertificateSigner, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    digests = {path: sha256(data).hexdigest() for path, data in FILES.items()}
    with monkeypatch.context() as patch:
        patch.setattr(certificate, constant, "urn:something-else")
        (export / CERTIFICATE_FILE).write_bytes(signer.sign(digests, {}))
    with pytest.raises(CertificateError, match="something-else"):
        verify(export)


def test_an_export_that_somebody_signed_anew_is_not_the_trainers(export: Path, signer: CertificateSigner) -> None:
    forger = CertificateSigner(new_key_pair()[0])
    (export / "config.json").write_bytes(b"[]")
    digests = {path: sha256((export / path).read_bytes()).hexdigest() for path in FILES}
    (export / CERTIFICATE_FILE).write_bytes(forger.sign(digests, {}))
    (export / SIGNER_FILE).write_bytes(forger.public_key_pem)
    assert not verify(export).trusted
    with pytest.raises(CertificateError, match="is signed by key"):
        verify(export, signer.public_key_pem)


def test_the_command_names_the_key_and_fails_on_tampering(
    export: Path, tmp_path: Path, signer: CertificateSigner
) -> None:
    app = build_app([EntryPoint("verify", "veneer_rpc.cli:verify", "veneer.commands"),
                     EntryPoint("status", "veneer_rpc.cli:verify", "veneer.commands")])  # fmt: skip
    key = tmp_path / "key.pem"
    key.write_bytes(signer.public_key_pem)
    shown = CliRunner().invoke(app, ["verify", str(export)])
    assert shown.exit_code == 0
    key_id = verify(export).key_id
    assert key_id in shown.output
    assert "give --key" in shown.output
    assert "check.prompts: 100" in shown.output
    with_key = CliRunner().invoke(app, ["verify", str(export), "--key", str(key), "--json"])
    assert json.loads(with_key.output)["trusted"]
    _flip(export / "part/weights.bin")
    failed = CliRunner().invoke(app, ["verify", str(export), "--json"])
    assert failed.exit_code == 1
    assert not json.loads(failed.output)["holds"]
