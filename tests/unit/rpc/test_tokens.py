"""Tokens, their file, and delegations."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog

from veneer_rpc.authentication import BearerAuthenticator, RoleTable
from veneer_rpc.calls import Principal
from veneer_rpc.errors import PermissionDenied, Unauthenticated
from veneer_rpc.tokens import TokenFile, TokenFileError, add_token, hash_token, new_token, read_tokens


def test_a_token_is_long_and_recognisable_and_never_the_same() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(token.startswith("vnr_") and len(token) == 47 for token in tokens)


def test_an_added_token_is_found_and_only_its_hash_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    ends = datetime(2027, 1, 1, tzinfo=UTC)
    first = add_token(path, "acme", ["user"])
    second = add_token(path, "globex", ["worker", "user"], ends)
    text = path.read_text()
    assert first not in text
    assert hash_token(first) in text
    assert '"2027-01-01T00:00:00Z"' in text
    assert path.stat().st_mode & 0o777 == 0o600
    tokens = TokenFile(path)
    found = tokens.find(second)
    assert found is not None
    assert (found.tenant, found.roles, found.expires_at) == ("globex", {"worker", "user"}, ends)
    assert (found.expired(ends - timedelta(seconds=1)), found.expired(ends)) == (False, True)
    assert tokens.find(first + "x") is None
    assert list(tmp_path.iterdir()) == [path]  # nothing temporary is left


def test_tokens_added_and_revoked_later_count_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    first = add_token(path, "acme", ["user"])
    tokens = TokenFile(path)
    second = add_token(path, "acme", ["user"])
    assert tokens.find(second)
    path.write_text('{"tokens": []}')
    assert tokens.find(first) is None


def test_a_file_that_goes_wrong_is_logged_and_the_last_good_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token = add_token(path, "acme", ["user"])
    tokens = TokenFile(path)
    for spoil in (lambda: path.write_text("{"), lambda: os.unlink(path)):
        spoil()
        with structlog.testing.capture_logs() as lines:
            assert tokens.find(token)
            assert tokens.find(token)
        assert [line["event"] for line in lines] == ["token file ignored"]
        assert token not in str(lines)


def test_every_problem_of_a_file_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    good = {"sha256": "a" * 64, "tenant": "acme", "roles": ["user"], "expires_at": None}
    rows = [
        good,
        {**good, "sha256": "A" * 64, "tenant": "Acme"},
        {**good, "roles": []},
        {**good, "expires_at": "2027-01-01T00:00:00"},
        {**good, "expires_at": "soon"},
        {**good, "expires_at": 3},
        {**good, "extra": 1},
        "text",
    ]
    path.write_text(json.dumps({"tokens": rows}))
    with pytest.raises(TokenFileError) as caught:
        read_tokens(path)
    lines = str(caught.value).splitlines()
    assert [line.partition("tokens[")[2][0] for line in lines] == list("1234567")
    assert "sha256" in lines[0]
    assert "tenant" in lines[0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tokens": {}}', '{"tokens": [], "more": 1}', "\xff"])
def test_what_is_not_a_token_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text, "latin-1")
    with pytest.raises(TokenFileError, match=r"tokens\.json"):
        TokenFile(path)
    with pytest.raises(TokenFileError):
        add_token(path, "acme", ["user"])
    assert path.read_text("latin-1") == text


@pytest.mark.parametrize(("tenant", "roles"), [("", ["user"]), ("a/b", ["user"]), ("acme", []), ("acme", ["User"])])
def test_a_malformed_tenant_or_role_makes_no_token(tmp_path: Path, tenant: str, roles: list[str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        add_token(tmp_path / "tokens.json", tenant, roles)
    assert not list(tmp_path.iterdir())


def test_without_a_verifier_no_delegation_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token = add_token(path, "acme", ["user"])
    authenticator = BearerAuthenticator(TokenFile(path))
    assert authenticator.authenticate(f"bearer {token}") == Principal("acme", frozenset({"user"}))
    with pytest.raises(Unauthenticated):
        authenticator.authenticate("Bearer vnd1.a.b")


def test_the_methods_own_roles_win() -> None:
    table = RoleTable({"p.S": ["worker"], "p.S/Open": ["user", "worker"]})
    worker, user = Principal("t", frozenset({"worker"})), Principal("t", frozenset({"user"}))
    table.check("p.S/Any", worker)
    table.check("p.S/Open", user)
    table.check("p.Other/Any", user)
    for method, principal in (("p.S/Any", user), ("p.Other/Any", worker), ("p.SX/Any", worker)):
        with pytest.raises(PermissionDenied):
            table.check(method, principal)
