"""Delegations that this service signs: for its workers, and for its own calls to the dataset service."""

from __future__ import annotations

from pathlib import Path

from veneer_rpc.delegation import DelegationSigner

LIFETIME_S = 3600


class SignedDelegations:
    """The Delegations of one private key.

    Args:
        key_file: PKCS #8 PEM of an Ed25519 key.

    Raises:
        ValueError: the key is of another kind.
        OSError: the file cannot be read.
    """

    def __init__(self, key_file: Path) -> None:
        self._signer = DelegationSigner(key_file.read_bytes())

    def for_worker(self, worker: str, tenant: str) -> str:
        """See Delegations."""
        return self._signer.sign(worker, tenant, ["dataset", "inference"], ["user"], LIFETIME_S)

    def for_trainer(self, tenant: str) -> str:
        """Returns a credential for this service's own calls to the dataset service."""
        return self._signer.sign("trainer", tenant, ["dataset"], ["service", "user"], 60)
