"""From a call's `authorization` metadata to a principal, and which roles a method needs."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Protocol

from veneer_rpc.calls import Principal
from veneer_rpc.delegation import DELEGATION_PREFIX, DelegationVerifier
from veneer_rpc.errors import PermissionDenied, Unauthenticated
from veneer_rpc.tokens import TOKEN_PREFIX, TokenFile

DEFAULT_ROLE = "user"
_MAX_CREDENTIAL_BYTES = 4096


class Authenticator(Protocol):
    """Knows callers by their credential."""

    def authenticate(self, authorization: str | None) -> Principal:
        """Returns who the value of `authorization` stands for.

        Raises:
            Unauthenticated: the credential is missing, malformed, unknown, foreign or expired.
        """


class BearerAuthenticator:
    """Accepts tokens from a file and, where a verifier is given, delegations signed by the trainer."""

    def __init__(self, tokens: TokenFile, delegations: DelegationVerifier | None = None) -> None:
        self._tokens = tokens
        self._delegations = delegations

    def authenticate(self, authorization: str | None) -> Principal:
        """See Authenticator."""
        if authorization is None:
            raise Unauthenticated("TOKEN_MISSING", "send metadata authorization: Bearer <token>")
        scheme, _, credential = authorization.partition(" ")
        if scheme.lower() != "bearer" or not credential or len(credential) > _MAX_CREDENTIAL_BYTES:
            raise Unauthenticated("TOKEN_MALFORMED", "authorization must be: Bearer <token>")
        if self._delegations and credential.startswith(DELEGATION_PREFIX):
            return self._delegations.verify(credential)
        if not credential.startswith(TOKEN_PREFIX):
            raise Unauthenticated("TOKEN_MALFORMED", f"a token starts with {TOKEN_PREFIX}")
        entry = self._tokens.find(credential)
        if entry is None:
            raise Unauthenticated("TOKEN_UNKNOWN", "this server does not know the token")
        if entry.expired(datetime.now(UTC)):
            raise Unauthenticated("TOKEN_EXPIRED", f"the token ended at {entry.expires_at:%Y-%m-%dT%H:%M:%SZ}")
        return Principal(entry.tenant, entry.roles)


class RoleTable:
    """Which roles may call a method; any one of them is enough.

    Args:
        roles: by service (`veneer.trainer.v1.WorkerService`) or method (`veneer.trainer.v1.AdapterService/
            ReportServing`); a method's own entry wins. What has none needs the role `user`.
    """

    def __init__(self, roles: Mapping[str, Iterable[str]]) -> None:
        self._roles = {name: frozenset(needed) for name, needed in roles.items()}

    @property
    def names(self) -> frozenset[str]:
        """The services and methods with an entry of their own."""
        return frozenset(self._roles)

    def check(self, method: str, principal: Principal) -> None:
        """Lets a principal call `package.Service/Method`.

        Raises:
            PermissionDenied: it has none of the roles.
        """
        service = method.partition("/")[0]
        needed = self._roles.get(method) or self._roles.get(service) or frozenset({DEFAULT_ROLE})
        if not needed & principal.roles:
            raise PermissionDenied(
                "ROLE_MISSING",
                f"{method} needs the role {' or '.join(sorted(needed))}",
                metadata={"method": method},
            )
