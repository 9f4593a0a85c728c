"""A real grpc.aio server on a free loopback port, with a service over well-known types."""

# ruff: noqa: ANN401  # a servicer's context and a started call have no useful type

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from google.protobuf.wrappers_pb2 import StringValue

from veneer_rpc.authentication import BearerAuthenticator
from veneer_rpc.channel import open_channel
from veneer_rpc.delegation import DelegationSigner, DelegationVerifier, new_key_pair
from veneer_rpc.server import Server
from veneer_rpc.settings import ServerSettings
from veneer_rpc.tokens import TokenFile

SERVICE = "veneer.test.v1.EchoService"


@dataclass
class Credentials:
    """What callers hold, and what the server knows of it."""

    tokens_file: Path
    signer: DelegationSigner
    foreign_signer: DelegationSigner
    authenticator: BearerAuthenticator
    user: str = "vnr_user"
    worker: str = "vnr_worker"
    expired: str = "vnr_expired"


@pytest.fixture
def credentials(tmp_path: Path) -> Credentials:
    def row(token: str, role: str, ends: timedelta) -> dict[str, Any]:
        digest = hashlib.sha256(token.encode()).hexdigest()
        expires_at = (datetime.now(UTC) + ends).isoformat()
        return {"sha256": digest, "tenant": "acme", "roles": [role], "expires_at": expires_at}

    hour = timedelta(hours=1)
    rows = [
        row("vnr_user", "user", hour),
        row("vnr_worker", "worker", hour),
        row("vnr_expired", "user", -hour),
    ]
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"tokens": rows}))
    private, public = new_key_pair()
    verifier = DelegationVerifier("dataset", [public])
    return Credentials(
        path,
        DelegationSigner(private),
        DelegationSigner(new_key_pair()[0]),
        BearerAuthenticator(TokenFile(path), verifier),
    )


@dataclass
class Running:
    """A server that listens, and channels to it."""

    server: Server
    address: str
    stack: AsyncExitStack
    token: str

    async def channel(self, *args: Any, **kwargs: Any) -> grpc.aio.Channel:
        return await self.stack.enter_async_context(open_channel(self.address, *(args or (self.token,)), **kwargs))

    async def idle(self) -> None:
        """Waits until every call has ended and its line is in the log."""
        await self.server._calls.wait_idle(2)

    async def call(self, kind: str, method: str = "", **kwargs: Any) -> Callable[..., Any]:
        """Returns what calls a method; `method` defaults to the kind of call in CamelCase."""
        channel = await self.channel(**kwargs)
        name = method or "".join(word.title() for word in kind.split("_"))
        return getattr(channel, kind)(f"/{SERVICE}/{name}", StringValue.SerializeToString, StringValue.FromString)


Serve = Callable[..., Awaitable[Running]]


@pytest.fixture
async def serve(credentials: Credentials) -> AsyncIterator[Serve]:
    """Starts a server whose methods are given by kind: `serve(unary_unary=echo)` serves `UnaryUnary`."""
    stack = AsyncExitStack()

    async def start(
        roles: Mapping[str, set[str]] | None = None, settings: Mapping[str, Any] | None = None, **methods: Any
    ) -> Running:
        def register(server: Any) -> None:
            handlers = {
                "".join(word.title() for word in kind.split("_")): getattr(grpc, f"{kind}_rpc_method_handler")(
                    method, StringValue.FromString, StringValue.SerializeToString
                )
                for kind, method in methods.items()
            }
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
            server.add_registered_method_handlers(SERVICE, handlers)

        chosen = ServerSettings(**{"tokens_file": credentials.tokens_file, "grace_s": 0, **(settings or {})})
        server = Server(chosen, [register], credentials.authenticator, roles)
        address = await server.start()
        stack.push_async_callback(server.stop)
        return Running(server, address, stack, credentials.user)

    yield start
    await stack.aclose()


@pytest.fixture
def lines() -> Any:
    """The structured log lines of a test, with what the call bound to its context."""
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as captured:
        yield captured
