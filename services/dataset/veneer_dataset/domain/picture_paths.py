"""From a path in a row to a picture of the manifest.

Nothing here is ever a path of this machine: a manifest's paths are names and no more. Refused all the same
are those that a client could not safely have meant.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from veneer_dataset.domain.findings import Refusal, shown
from veneer_dataset.domain.lines import row_lines
from veneer_rpc.errors import ResourceExhausted, Violation, invalid

MAX_PATH_BYTES = 1024
MAX_ENTRIES = 2_000_000

_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]|^.:")  # control characters, another system's separator, a drive
_AMBIGUOUS = -1


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    path: str
    digest: str


_decode = msgspec.json.Decoder(_Entry).decode


@dataclass(frozen=True, slots=True)
class Match:
    """The manifest's entry that a path means, and the finding that says how if it was not by its name."""

    entry: int
    code: str = ""
    found: str = ""


class PictureManifest:
    """Paths and digests of the pictures that rows may name; which of them were named is noted."""

    def __init__(self, pieces: Iterable[bytes] = ()) -> None:
        """Reads the manifest's JSON lines.

        Raises:
            InvalidArgument: a line that is no entry, a path that is unsafe or there twice.
            ResourceExhausted: too many entries.
        """
        self._entries: dict[str, int] = {}
        self._digests = bytearray()
        for number, line in row_lines(pieces, "picture_manifest"):
            self._add(number, line)
        self._named = bytearray(len(self._entries))
        self._by_form: dict[str, int] | None = None
        self._by_base: dict[str, int] | None = None
        self._paths: list[str] = []  # by entry; filled when first asked for

    def __len__(self) -> int:
        return len(self._entries)

    def resolve(self, path: str, json_path: str) -> Match:
        """The entry that a row's path means.

        By its name; else by another Unicode form or case, where one alone fits; else below `images/`; else
        by its last part, where one file alone has it.

        Raises:
            Refusal: the path is unsafe, or fits none or several.
        """
        entry = self._entries.get(path)
        match = Match(entry) if entry is not None else self._search(path, json_path)
        self._named[match.entry] = 1
        return match

    def digest(self, entry: int) -> bytes:
        """SHA-256 of an entry's picture, 32 bytes."""
        return bytes(self._digests[32 * entry : 32 * entry + 32])

    def path(self, entry: int) -> str:
        """An entry's path."""
        if not self._paths:
            self._paths = list(self._entries)
        return self._paths[entry]

    def unnamed(self) -> list[str]:
        """Paths that no row has named, sorted."""
        return sorted(path for path, entry in self._entries.items() if not self._named[entry])

    def _add(self, number: int, line: bytes) -> None:
        field = f"picture_manifest:{number}"
        try:
            entry = _decode(line)
            path = safe_path(entry.path, "$.path")
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise invalid(Violation(field, "MANIFEST_LINE", f'must be {{"path": …, "digest": …}}: {error}')) from None
        except Refusal as refusal:
            raise invalid(Violation(field, "MANIFEST_PATH", f"unsafe path {refusal.found}")) from None
        if not _DIGEST.fullmatch(entry.digest):
            raise invalid(
                Violation(field, "MANIFEST_DIGEST", f"must be 64 lower-case hex digits, was {shown(entry.digest)}")
            )
        if len(self._entries) == MAX_ENTRIES:
            raise ResourceExhausted("TOO_MANY_PICTURES", f"the manifest has over {MAX_ENTRIES} entries, the limit")
        if self._entries.setdefault(path, len(self._entries)) != len(self._digests) // 32:
            raise invalid(Violation(field, "MANIFEST_PATH", f"{shown(path)} is there twice"))
        self._digests += bytes.fromhex(entry.digest)

    def _search(self, path: str, json_path: str) -> Match:
        path = safe_path(path, json_path)
        entry = self._entries.get(path)
        if entry is not None:
            return Match(entry)
        if self._by_form is None:
            self._by_form = self._index(_form)
        entry = self._by_form.get(_form(path))
        if entry is not None and entry != _AMBIGUOUS:
            return Match(entry, "PATH_CASE", f"{shown(path)} means {shown(self.path(entry))}")
        if entry is None:
            entry = self._entries.get(f"images/{path}")
        if entry is None:
            if self._by_base is None:
                self._by_base = self._index(_base)
            entry = self._by_base.get(_base(path))
        if entry is None:
            raise Refusal("PICTURE_MISSING", json_path, path)
        if entry == _AMBIGUOUS:
            raise Refusal("PICTURE_AMBIGUOUS", json_path, path)
        return Match(entry, "PATH_SEARCHED", f"{shown(path)} lies at {shown(self.path(entry))}")

    def _index(self, key_of: Callable[[str], str]) -> dict[str, int]:
        index: dict[str, int] = {}
        for path, entry in self._entries.items():
            key = key_of(path)
            index[key] = _AMBIGUOUS if key in index else entry
        return index


def entry_paths(pieces: Iterable[bytes], entries: set[int]) -> dict[int, str]:
    """The paths of some entries, from a manifest that was read before: it is too large to be kept for them.

    Args:
        pieces: the manifest's JSON lines.
        entries: their numbers; one that is none of the manifest's is left out.
    """
    lines = enumerate(row_lines(pieces, "picture_manifest")) if entries else ()
    return {entry: safe_path(_decode(line).path, "$.path") for entry, (_, line) in lines if entry in entries}


def safe_path(path: str, json_path: str) -> str:
    """A relative path without `.` parts.

    Raises:
        Refusal: it leaves the root, is absolute, too long, or written in another system's way.
    """
    parts = [part for part in path.split("/") if part != "."]
    if not path or len(path.encode()) > MAX_PATH_BYTES or _UNSAFE.search(path) or ".." in parts or "" in parts:
        raise Refusal("PICTURE_PATH", json_path, path if len(path) <= 120 else f"{path[:120]}… ({len(path)} long)")
    return "/".join(parts)


def _form(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _base(path: str) -> str:
    return path.rpartition("/")[2]
