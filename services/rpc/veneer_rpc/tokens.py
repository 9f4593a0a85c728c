"""Bearer tokens: making one, and the file of hashes by which a service knows them.

The file is JSON, since `veneer tokens create` writes it and the standard library reads TOML but does not
write it:

    {"tokens": [{"sha256": "…64 hex…", "tenant": "acme", "roles": ["user"],
                 "expires_at": "2027-01-01T00:00:00Z"}]}

`expires_at` is null for a token that does not end. The token itself is stored nowhere.
"""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from veneer_rpc.names import is_id

TOKEN_PREFIX = "vnr_"  # noqa: S105  # so that scanners of repositories and logs can recognise one
_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = structlog.get_logger(__name__)


class TokenFileError(ValueError):
    """A token file that cannot be used; the message lists every problem with its place."""


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """What a service knows of one token.

    Raises:
        ValueError: a value is malformed; the text names all that are.
    """

    sha256: str
    tenant: str
    roles: frozenset[str]
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        problems = []
        if not _SHA256.fullmatch(self.sha256):
            problems.append("sha256 must be 64 lower-case hex digits")
        if not is_id(self.tenant):
            problems.append(f"tenant must be 1-63 of a-z, 0-9 and '-', starting with a letter, was {self.tenant!r}")
        bad_roles = sorted(role for role in self.roles if not _ROLE.fullmatch(role))
        if not self.roles or bad_roles:
            problems.append(f"roles must be one or more lower-case words, was {bad_roles or 'empty'}")
        if self.expires_at is not None and self.expires_at.tzinfo is None:
            problems.append("expires_at must have a time zone, such as a final Z")
        if problems:
            raise ValueError("; ".join(problems))

    def expired(self, now: datetime) -> bool:
        """Says whether the token's time is over."""
        return self.expires_at is not None and now >= self.expires_at


def new_token() -> str:
    """Returns a new secret of 256 bits with a recognisable prefix. Show it once; store only its hash."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """Returns the SHA-256 of a token in hex. No salt or stretching: 256 random bits cannot be guessed."""
    return hashlib.sha256(token.encode()).hexdigest()


class TokenFile:
    """The tokens a service accepts; follows its file, so that adding or revoking one needs no restart.

    Raises:
        TokenFileError: when made, if the file is missing or wrong. Later, a wrong file is logged and the
            last good one stays in force.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = _version(path)
        self._entries = read_tokens(path)

    def find(self, token: str) -> TokenEntry | None:
        """Returns the entry of a token, expired or not. Compares with every entry, each in constant time."""
        self._refresh()
        wanted, found = hash_token(token), None
        for entry in self._entries:
            if hmac.compare_digest(entry.sha256, wanted):
                found = entry
        return found

    def _refresh(self) -> None:
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._entries = read_tokens(self._path)
        except TokenFileError as error:
            _log.error("token file ignored", problem=str(error))


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def read_tokens(path: Path) -> tuple[TokenEntry, ...]:
    """Reads a token file.

    Raises:
        TokenFileError: with every problem in the file.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TokenFileError(f"{path}: {error}") from error
    rows = document.get("tokens") if isinstance(document, dict) and document.keys() == {"tokens"} else None
    if not isinstance(rows, list):
        raise TokenFileError(f'{path}: must be an object with the one key "tokens", a list')
    entries, problems = [], []
    for index, row in enumerate(rows):
        try:
            entries.append(_entry(row))
        except ValueError as error:
            problems.append(f"{path}: tokens[{index}]: {error}")
    if problems:
        raise TokenFileError("\n".join(problems))
    return tuple(entries)


def _entry(row: Any) -> TokenEntry:  # noqa: ANN401  # anything JSON can hold
    keys = {"sha256", "tenant", "roles", "expires_at"}
    if not isinstance(row, dict) or row.keys() != keys:
        raise ValueError(f"must be an object with the keys {', '.join(sorted(keys))}")
    roles, expires_at = row["roles"], row["expires_at"]
    texts = [row["sha256"], row["tenant"], *(roles if isinstance(roles, list) else [None])]
    if not all(isinstance(text, str) for text in texts) or not isinstance(expires_at, str | None):
        raise ValueError("sha256 and tenant must be texts, roles a list of texts, expires_at a text or null")
    when = datetime.fromisoformat(expires_at) if expires_at is not None else None
    return TokenEntry(row["sha256"], row["tenant"], frozenset(roles), when)


def add_token(
    path: Path, tenant: str, roles: Iterable[str], expires_at: datetime | None = None, token: str | None = None
) -> str:
    """Adds a token's hash to a file (made if missing, mode 0600) and returns the token.

    The file is replaced at once, while its folder is locked: several may add at the same time.

    Args:
        path: the file.
        tenant: whose data the token opens.
        roles: what it may do.
        expires_at: when it ends; None for one that does not.
        token: one that other files know too. Default: a new one.

    Raises:
        TokenFileError: the file that is there is wrong.
        ValueError: the tenant, a role or the time is malformed.
    """
    token = token or new_token()
    entry = TokenEntry(hash_token(token), tenant, frozenset(roles), expires_at)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # two at once would lose one of the tokens
        entries = (*(read_tokens(path) if path.exists() else ()), entry)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as new:  # mode 0600
            json.dump({"tokens": [_row(each) for each in entries]}, new, indent=2)
            new.flush()
            os.fsync(new.fileno())
        Path(new.name).replace(path)
    finally:
        os.close(directory)
    return token


def _row(entry: TokenEntry) -> dict[str, object]:
    when = entry.expires_at and entry.expires_at.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return {"sha256": entry.sha256, "tenant": entry.tenant, "roles": sorted(entry.roles), "expires_at": when}
