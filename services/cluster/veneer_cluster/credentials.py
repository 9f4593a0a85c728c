"""Who may call whom on this machine: tokens, their hashes for each service, the key of delegations.

Made once for a folder and kept. A service's file holds hashes alone; only its owner can read a token's file.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer_cluster.folder import ClusterError, Folder
from veneer_rpc.delegation import new_key_pair
from veneer_rpc.tokens import add_token, new_token

SERVICES = ("dataset", "trainer", "inference")
TENANT = "local"
SYSTEM_TENANT = "system"


@dataclass(frozen=True)
class Caller:
    """A part of the cluster that calls others: its role, and the services that know it."""

    name: str
    tenant: str
    roles: tuple[str, ...]
    services: tuple[str, ...]


CALLERS = (
    Caller("user", TENANT, ("user",), SERVICES),
    Caller("worker", SYSTEM_TENANT, ("worker",), ("trainer",)),
    Caller("replica", SYSTEM_TENANT, ("replica",), ("trainer",)),
    Caller("dataset", SYSTEM_TENANT, ("service",), ("trainer",)),
    Caller("trainer", SYSTEM_TENANT, ("service",), ("dataset", "inference")),
)


def tokens_file(folder: Folder, service: str) -> Path:
    """The hashes that a service accepts."""
    return folder.secrets / f"{service}-tokens.json"


def token_file(folder: Folder, caller: str) -> Path:
    """The token that a part of the cluster calls others with."""
    return folder.secrets / f"{caller}.token"


def ensure(folder: Folder) -> str:
    """Makes what is missing, and returns the token of this machine's user.

    Raises:
        ClusterError: a token file that is there cannot be read.
    """
    for caller in CALLERS:
        path = token_file(folder, caller.name)
        if not path.exists():
            token = grant(folder, caller.tenant, caller.roles, caller.services)
            _write_secret(path, token.encode())
    private, public = folder.secrets / "delegation.pem", folder.secrets / "delegation-public.pem"
    if not private.exists():
        private_pem, public_pem = new_key_pair()
        _write_secret(public, public_pem)
        _write_secret(private, private_pem)
    return token_file(folder, "user").read_text("utf-8")


def grant(folder: Folder, tenant: str, roles: Iterable[str] = ("user",), services: Sequence[str] = SERVICES) -> str:
    """Makes a token that some services accept for a tenant from now on, without a restart, and returns it.

    Raises:
        ClusterError: the tenant or a role is malformed, or a token file cannot be read.
    """
    token, roles = new_token(), tuple(roles)
    try:
        for service in services:
            add_token(tokens_file(folder, service), tenant, roles, token=token)
    except ValueError as error:
        raise ClusterError(str(error)) from error
    return token


def _write_secret(path: Path, secret: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
