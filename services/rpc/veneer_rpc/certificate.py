"""An export's certificate: what its folder holds and how equal it is, in a DSSE envelope, checked without a network.

The statement is an in-toto one (https://github.com/in-toto/attestation, Statement v1): `subject` names every file of
the folder with its SHA-256, `predicate` is what the exporter found. It lies in the folder as `certificate.json`, under
a signature by Ed25519 (RFC 8032) over DSSE's pre-authentication encoding
(https://github.com/secure-systems-lab/dsse/blob/master/protocol.md), beside the signer's public key, `signer.pem`.

A folder that holds together by its own `signer.pem` is whole; that it comes from a certain trainer is only known by a
key that came another way.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

CERTIFICATE_FILE = "certificate.json"
SIGNER_FILE = "signer.pem"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:veneer:export:v1"
_MAX_BYTES = 4 << 20


class CertificateError(ValueError):
    """A folder that is not what its certificate says, or a certificate that does not hold.

    Attributes:
        problems: one sentence for each.
    """

    def __init__(self, folder: Path, problems: list[str]) -> None:
        super().__init__(f"{folder}: {'; '.join(problems)}")
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Certified:
    """A folder whose certificate holds.

    Attributes:
        key_id: of the signer: SHA-256 of the public key's DER form, hex.
        trusted: True when the signer's key is the one that the caller gave.
        predicate: what the exporter found.
        digests: SHA-256 of every file, by path.
    """

    key_id: str
    trusted: bool
    predicate: dict[str, Any]
    digests: dict[str, str]


class CertificateSigner:
    """Signs certificates; only the trainer has one.

    Args:
        private_key_pem: PKCS #8, as `delegation.new_key_pair` writes it.

    Raises:
        ValueError: the key is not an Ed25519 private key.
    """

    def __init__(self, private_key_pem: bytes) -> None:
        key = serialization.load_pem_private_key(private_key_pem, password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("the certificates' key must be an Ed25519 private key")
        self._key = key

    @property
    def public_key_pem(self) -> bytes:
        """The key that checks what this signs."""
        return self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(self, digests: Mapping[str, str], predicate: Mapping[str, Any]) -> bytes:
        """Returns the envelope.

        Args:
            digests: SHA-256 of every file of the folder, by path.
            predicate: what was found.
        """
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": path, "digest": {"sha256": digest}} for path, digest in sorted(digests.items())],
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate,
        }
        payload = json.dumps(statement, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        signature = {"keyid": _key_id(self._key.public_key()), "sig": _encode(self._key.sign(_encoded(payload)))}
        envelope = {"payload": _encode(payload), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}
        return json.dumps(envelope, indent=2).encode() + b"\n"


def verify(folder: Path, trusted_key_pem: bytes | None = None) -> Certified:
    """Checks signature and statement, and reads every file of an export's folder.

    Args:
        folder: the export.
        trusted_key_pem: the key that must have signed; None takes the folder's own.

    Raises:
        CertificateError: with everything that is wrong: no certificate, a signature that does not hold, another
            signer, a file that is changed, missing or not in the statement.
    """
    try:
        key = _public_key(trusted_key_pem or _small(folder / SIGNER_FILE))
        envelope = _object(_small(folder / CERTIFICATE_FILE), "the envelope")
        statement = _statement(envelope, key)
        digests = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
        predicate = statement["predicate"]
        if not isinstance(predicate, dict):
            raise ValueError("the statement's predicate is no object")
    except (KeyError, TypeError) as error:
        raise CertificateError(folder, [f"the certificate is malformed: {error!r}"]) from error
    except (OSError, ValueError) as error:
        text = f"{Path(error.filename).name}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise CertificateError(folder, [text]) from error
    problems = _file_problems(folder, digests)
    if problems:
        raise CertificateError(folder, problems)
    return Certified(_key_id(key), trusted_key_pem is not None, predicate, digests)


def _file_problems(folder: Path, digests: Mapping[str, str]) -> list[str]:
    found = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    }
    problems = [f"{path} is missing" for path in sorted(digests.keys() - found.keys())]
    for name, path in found.items():
        if name in (CERTIFICATE_FILE, SIGNER_FILE):
            continue
        if name not in digests:
            problems.append(f"{name} is not in the certificate")
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != digests[name]:
            problems.append(f"{name} has SHA-256 {digest}, certified is {digests[name]}")
    return problems


def _statement(envelope: Mapping[str, Any], key: Ed25519PublicKey) -> dict[str, Any]:
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise ValueError(f"the envelope's payload is {str(envelope['payloadType'])[:80]!r}, not {PAYLOAD_TYPE}")
    payload, key_id = _decode(envelope["payload"]), _key_id(key)
    signers = [str(each.get("keyid"))[:64] for each in envelope["signatures"]]
    if not any(_holds(key, payload, _decode(each["sig"])) for each in envelope["signatures"]):
        if key_id in signers:
            raise ValueError(f"the signature by key {key_id} does not hold: the certificate was changed")
        raise ValueError(f"the certificate is signed by key {', '.join(signers) or 'nobody'}, not by {key_id}")
    statement = _object(payload, "the statement")
    for field, wanted in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if statement[field] != wanted:
            raise ValueError(f"the statement's {field} is {str(statement[field])[:80]!r}, not {wanted}")
    return statement


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode()
    return b" ".join((b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload))


def _holds(key: Ed25519PublicKey, payload: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, _encoded(payload))
    except InvalidSignature:
        return False
    return True


def _key_id(key: Ed25519PublicKey) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _public_key(pem: bytes) -> Ed25519PublicKey:
    key = serialization.load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("the signer's key must be an Ed25519 public key")
    return key


def _small(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path.name} has more than {_MAX_BYTES} bytes")
    return data


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object")
    return value


def _encode(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the envelope is not base64: {error}") from error
