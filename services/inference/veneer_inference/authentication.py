"""Who may call: users, and those who show that the trainer lets them act for a tenant."""

from dataclasses import replace

from veneer_rpc.authentication import DEFAULT_ROLE, BearerAuthenticator
from veneer_rpc.calls import Principal


class DelegatingAuthenticator(BearerAuthenticator):
    """A delegation gives a user's rights here, whatever the roles of the service that shows it."""

    def authenticate(self, authorization: str | None) -> Principal:
        """See Authenticator."""
        principal = super().authenticate(authorization)
        if not principal.subject:
            return principal
        return replace(principal, roles=principal.roles | {DEFAULT_ROLE})
