"""Short-lived proof that a service may act for a tenant, signed by the trainer.

Ed25519 (RFC 8032), not HMAC: an inference replica or a dataset server that is broken into holds only a
public key, and cannot make itself a delegation for another tenant. The credential is
`vnd1.<payload>.<signature>`, both parts base64url without padding; the payload is JSON and the signature
covers the prefix too. There is one algorithm, so none is named.
"""

import base64
import binascii
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from veneer_rpc.calls import Principal
from veneer_rpc.errors import Unauthenticated

DELEGATION_PREFIX = "vnd1."
MAX_LIFETIME_S = 3600
_SKEW_S = 30  # how far two machines' clocks may differ


@dataclass(frozen=True, slots=True)
class _Claims:
    subject: str
    tenant: str
    audiences: list[str]
    roles: list[str]
    not_before_s: int
    expires_s: int


class DelegationSigner:
    """Signs delegations; only the trainer has one.

    Args:
        private_key_pem: PKCS #8, as `new_key_pair` or `openssl genpkey -algorithm ed25519` writes it.

    Raises:
        ValueError: the key is not an Ed25519 private key.
    """

    def __init__(self, private_key_pem: bytes) -> None:
        key = serialization.load_pem_private_key(private_key_pem, password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError("the delegation key must be an Ed25519 private key")
        self._key = key

    def sign(
        self, subject: str, tenant: str, audiences: Iterable[str], roles: Iterable[str], lifetime_s: int = 600
    ) -> str:
        """Returns a credential with which `subject` may call the services `audiences` for `tenant`.

        Raises:
            ValueError: the lifetime is not within 1 to MAX_LIFETIME_S.
        """
        if not 1 <= lifetime_s <= MAX_LIFETIME_S:
            raise ValueError(f"lifetime_s must be 1 to {MAX_LIFETIME_S}, was {lifetime_s}")
        now_s = int(time.time())
        claims = _Claims(subject, tenant, sorted(audiences), sorted(roles), now_s, now_s + lifetime_s)
        payload = DELEGATION_PREFIX + _encode(json.dumps(asdict(claims), separators=(",", ":")).encode())
        return f"{payload}.{_encode(self._key.sign(payload.encode()))}"


class DelegationVerifier:
    """Checks delegations made for one audience, under any of the public keys (two while a key is replaced).

    Raises:
        ValueError: a key is not an Ed25519 public key.
    """

    def __init__(self, audience: str, public_keys_pem: Sequence[bytes]) -> None:
        self._audience = audience
        self._keys = []
        for pem in public_keys_pem:
            key = serialization.load_pem_public_key(pem)
            if not isinstance(key, Ed25519PublicKey):
                raise ValueError("a delegation key must be an Ed25519 public key")
            self._keys.append(key)

    def verify(self, credential: str) -> Principal:
        """Returns who acts, and for which tenant.

        Raises:
            Unauthenticated: malformed, signed by another key, for another service, expired or not yet valid.
        """
        payload, _, signature = credential.rpartition(".")
        try:
            signed_by_us = any(_signed(key, payload.encode(), _decode(signature)) for key in self._keys)
            if not signed_by_us:
                raise Unauthenticated("DELEGATION_FOREIGN", "the delegation is not signed by this system's trainer")
            claims = _Claims(**json.loads(_decode(payload.removeprefix(DELEGATION_PREFIX))))
        except (binascii.Error, ValueError, TypeError) as error:
            raise Unauthenticated("DELEGATION_MALFORMED", "the delegation cannot be read") from error
        if self._audience not in claims.audiences:
            raise Unauthenticated(
                "DELEGATION_FOREIGN", f"the delegation is for {', '.join(claims.audiences)}, this is {self._audience}"
            )
        now_s = time.time()
        if not claims.not_before_s - _SKEW_S <= now_s < claims.expires_s + _SKEW_S:
            raise Unauthenticated("DELEGATION_EXPIRED", "the delegation's time is over or has not begun")
        return Principal(claims.tenant, frozenset(claims.roles), claims.subject)


def new_key_pair() -> tuple[bytes, bytes]:
    """Returns a new private and public key, both as PEM."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private, public


def _signed(key: Ed25519PublicKey, payload: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, payload)
    except InvalidSignature:
        return False
    return True


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
