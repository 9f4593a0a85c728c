"""The digest of a row, and the one form a row has.

Owns the form, not the meaning: whether a row has an answer, fits a context or names a picture that exists is
the dataset's matter, and so is bringing an accepted dialect into this form. Nothing is repaired here.
"""

import hashlib
import json
from typing import Any

from veneer_digests.errors import NotCanonicalError, shown
from veneer_digests.preimage import digest_bytes, utf8

ROLES = ("system", "user", "assistant")

# For rows this is RFC 8785, at a quarter of rfc8785's time: every key is ASCII and the one number is 0.
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


def row_digest(row: object) -> str:
    """SHA-256 of `canonical_row(row)`; 64 hex digits."""
    return hashlib.sha256(canonical_row(row)).hexdigest()


def canonical_row(row: object) -> bytes:
    """The RFC 8785 JSON of a row that is in canonical form (protos/DIGESTS.md, "Row").

    Args:
        row: {"messages": [{"role": ..., "content": [part, ...]}, ...]}; a part is {"type": "text",
            "text": ...} or {"type": "image", "digest": ...}; an assistant's message that is not supervised
            has "weight": 0.

    Raises:
        NotCanonicalError: with the place, for any other form.
    """
    messages = _members(row, "$", "messages")["messages"]
    if not isinstance(messages, list) or not messages:
        raise NotCanonicalError(f"$.messages must be a list with a message in it, got {shown(messages)}")
    for index, message in enumerate(messages):
        _check_message(message, f"$.messages[{index}]")
    return _encode(row).encode("utf-8")


def _check_message(message: object, place: str) -> None:
    weighted = isinstance(message, dict) and "weight" in message
    members = _members(message, place, "role", "content", *(["weight"] if weighted else []))
    role, content = members["role"], members["content"]
    if role not in ROLES:
        raise NotCanonicalError(f"{place}.role must be one of {', '.join(ROLES)}, got {shown(role)}")
    if weighted:
        if role != "assistant":
            raise NotCanonicalError(f"{place}.weight is for an assistant's message, this one is the {role}'s")
        if type(members["weight"]) is not int or members["weight"] != 0:
            raise NotCanonicalError(f"{place}.weight is 0 or not there, got {shown(members['weight'])}")
    if not isinstance(content, list):
        raise NotCanonicalError(f"{place}.content must be a list of parts, got {shown(content)}")
    previous = None
    for index, part in enumerate(content):
        kind = _check_part(part, f"{place}.content[{index}]")
        if kind == previous == "text":
            raise NotCanonicalError(f"{place}.content[{index}] is a text after a text: make them one part")
        previous = kind


def _check_part(part: object, place: str) -> str:
    """Check one part and return its type."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        digest_bytes(_members(part, place, "type", "digest")["digest"], f"{place}.digest")
        return "image"
    if kind == "text":
        if not utf8(_members(part, place, "type", "text")["text"], f"{place}.text"):
            raise NotCanonicalError(f"{place}.text is empty: leave the part out")
        return "text"
    raise NotCanonicalError(f"{place} must be a part of type text or image, got {shown(kind or part)}")


def _members(value: object, place: str, *keys: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NotCanonicalError(f"{place} must be an object, got {shown(value)}")
    if value.keys() != set(keys):
        found = ", ".join(shown(key) for key in list(value)[:5])
        raise NotCanonicalError(f"{place} must have just the keys {', '.join(keys)}; it has {found or 'none'}")
    return value
