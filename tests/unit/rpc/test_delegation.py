"""Delegations: only the trainer's, only for their audience, only for a while."""

import base64
import json
import subprocess
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from veneer_rpc.calls import Principal
from veneer_rpc.delegation import DelegationSigner, DelegationVerifier, new_key_pair
from veneer_rpc.errors import Unauthenticated

PRIVATE, PUBLIC = new_key_pair()
SIGNER, VERIFIER = DelegationSigner(PRIVATE), DelegationVerifier("dataset", [PUBLIC])


def reason(verifier: DelegationVerifier, credential: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        verifier.verify(credential)
    return caught.value.reason


@given(st.text(max_size=20), st.text(max_size=20), st.sets(st.text(max_size=5), max_size=3))
def test_what_is_signed_is_read(subject: str, tenant: str, roles: set[str]) -> None:
    credential = SIGNER.sign(subject, tenant, ["dataset"], roles)
    assert VERIFIER.verify(credential) == Principal(tenant, frozenset(roles), subject)
    assert credential.isascii()


def test_another_key_or_audience_is_foreign() -> None:
    credential = SIGNER.sign("worker", "acme", ["dataset"], ["user"])
    other = DelegationVerifier("dataset", [new_key_pair()[1]])
    assert reason(other, credential) == "DELEGATION_FOREIGN"
    assert reason(DelegationVerifier("inference", [PUBLIC]), credential) == "DELEGATION_FOREIGN"
    assert reason(DelegationVerifier("dataset", []), credential) == "DELEGATION_FOREIGN"


def test_two_keys_count_while_one_replaces_the_other() -> None:
    both = DelegationVerifier("dataset", [new_key_pair()[1], PUBLIC])
    assert both.verify(SIGNER.sign("worker", "acme", ["dataset"], ["user"])).tenant == "acme"


@pytest.mark.parametrize(("later_s", "good"), [(-40, False), (-20, True), (0, True), (85, True), (95, False)])
def test_it_holds_for_its_time_and_a_little_skew(monkeypatch: pytest.MonkeyPatch, later_s: float, good: bool) -> None:
    now_s = float(int(time.time()))
    monkeypatch.setattr(time, "time", lambda: now_s)
    credential = SIGNER.sign("worker", "acme", ["dataset"], ["user"], lifetime_s=60)
    monkeypatch.setattr(time, "time", lambda: now_s + later_s)
    if good:
        assert VERIFIER.verify(credential)
    else:
        assert reason(VERIFIER, credential) == "DELEGATION_EXPIRED"


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
def test_no_garbage_passes_or_crashes(text: str) -> None:
    for credential in (text, f"vnd1.{text}", f"vnd1.{text}.{text}", f"vnd1..{text}"):
        assert reason(VERIFIER, credential) in ("DELEGATION_FOREIGN", "DELEGATION_MALFORMED")


def test_a_changed_claim_is_foreign() -> None:
    credential = SIGNER.sign("worker", "acme", ["dataset"], ["user"])
    prefix, payload, signature = credential.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    claims["tenant"] = "globex"
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    assert reason(VERIFIER, f"{prefix}.{forged}.{signature}") == "DELEGATION_FOREIGN"


@pytest.mark.parametrize("lifetime_s", [0, -1, 3601])
def test_a_lifetime_is_bounded(lifetime_s: int) -> None:
    with pytest.raises(ValueError, match="1 to 3600"):
        SIGNER.sign("worker", "acme", ["dataset"], ["user"], lifetime_s)


def test_keys_are_ed25519(tmp_path: Path) -> None:
    other = generate_private_key(SECP256R1())
    with pytest.raises(ValueError, match="Ed25519"):
        DelegationSigner(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ValueError, match="Ed25519"):
        DelegationVerifier(
            "dataset", [other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)]
        )
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "key.pem"], check=True)
    assert DelegationSigner((tmp_path / "key.pem").read_bytes()).sign("w", "acme", ["dataset"], ["user"])
