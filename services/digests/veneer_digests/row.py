"""The digest of a row, and the one form a row has.

Owns the form, not the meaning: whether a row has an answer, fits a context or names a picture that exists is
the dataset's matter, and so is bringing an accepted dialect into this form. Nothing is repaired here.
"""

import hashlib
import re
from collections.abc import KeysView
from typing import Any

import msgspec

from veneer_digests.errors import NotCanonicalError, shown
from veneer_digests.preimage import digest_bytes, utf8

ROLES = ("system", "user", "assistant")

# Keys in the order in which errors name them.
_ROW = dict.fromkeys(("messages",)).keys()
_MESSAGE, _WEIGHTED = dict.fromkeys(("role", "content")).keys(), dict.fromkeys(("role", "content", "weight")).keys()
_TEXT, _IMAGE = dict.fromkeys(("type", "text")).keys(), dict.fromkeys(("type", "digest")).keys()

# For rows this is RFC 8785, at a twentieth of rfc8785's time: every key is ASCII and the one number is 0.
_encode = msgspec.json.Encoder(order="sorted").encode

_DIGEST = re.compile("[0-9a-f]{64}")

_Place = tuple[int, ...]  # which message, and which of its parts


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
    try:
        if _is_plainly_canonical(row):
            return _encode(row)
    except UnicodeEncodeError:  # a lone surrogate, whose place is told
        pass
    _check(row)
    return _encode(row)


def _is_plainly_canonical(row: object) -> bool:
    """Whether a row of dicts and lists is in canonical form, lone surrogates apart: a fifth of `_check`'s time."""
    if type(row) is not dict or len(row) != 1 or type(messages := row.get("messages")) is not list or not messages:
        return False
    for message in messages:
        if type(message) is not dict or type(content := message.get("content")) is not list:
            return False
        role = message.get("role")
        if len(message) != 2:
            weight = message.get("weight")
            if len(message) != 3 or role != "assistant" or type(weight) is not int or weight:
                return False
        elif role not in ROLES:
            return False
        after_text = False
        for part in content:
            if type(part) is not dict or len(part) != 2:
                return False
            kind = part.get("type")
            if kind == "text" and not after_text:
                if type(text := part.get("text")) is not str or not text:
                    return False
                after_text = True
            elif kind == "image" and type(digest := part.get("digest")) is str and _DIGEST.fullmatch(digest):
                after_text = False
            else:
                return False
    return True


def _check(row: object) -> None:
    """Raises NotCanonicalError, with the place, for what is not in canonical form."""
    messages = _members(row, (), _ROW)["messages"]
    if not isinstance(messages, list) or not messages:
        raise NotCanonicalError(f"$.messages must be a list with a message in it, got {shown(messages)}")
    for index, message in enumerate(messages):
        _check_message(message, index)


def _check_message(message: object, number: int) -> None:
    weighted = isinstance(message, dict) and "weight" in message
    members = _members(message, (number,), _WEIGHTED if weighted else _MESSAGE)
    role, content = members["role"], members["content"]
    if role not in ROLES:
        raise NotCanonicalError(f"{_at(number)}.role must be one of {', '.join(ROLES)}, got {shown(role)}")
    if weighted:
        if role != "assistant":
            raise NotCanonicalError(f"{_at(number)}.weight is for an assistant's message, this one is the {role}'s")
        if type(members["weight"]) is not int or members["weight"] != 0:
            raise NotCanonicalError(f"{_at(number)}.weight is 0 or not there, got {shown(members['weight'])}")
    if not isinstance(content, list):
        raise NotCanonicalError(f"{_at(number)}.content must be a list of parts, got {shown(content)}")
    previous = None
    for index, part in enumerate(content):
        kind = _check_part(part, (number, index))
        if kind == previous == "text":
            raise NotCanonicalError(f"{_at(number, index)} is a text after a text: make them one part")
        previous = kind


def _check_part(part: object, place: _Place) -> str:
    """Check one part and return its type."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        digest_bytes(_members(part, place, _IMAGE)["digest"], f"{_at(*place)}.digest")
        return "image"
    if kind == "text":
        text = _members(part, place, _TEXT)["text"]
        if not isinstance(text, str) or not _is_unicode(text):
            utf8(text, f"{_at(*place)}.text")  # which says why not
        if not text:
            raise NotCanonicalError(f"{_at(*place)}.text is empty: leave the part out")
        return "text"
    raise NotCanonicalError(f"{_at(*place)} must be a part of type text or image, got {shown(kind or part)}")


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _members(value: object, place: _Place, keys: KeysView[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NotCanonicalError(f"{_at(*place)} must be an object, got {shown(value)}")
    if value.keys() != keys:
        found = ", ".join(shown(key) for key in list(value)[:5])
        raise NotCanonicalError(f"{_at(*place)} must have just the keys {', '.join(keys)}; it has {found or 'none'}")
    return value


def _at(*place: int) -> str:
    """Where that is: written out for errors alone, most rows have none."""
    return "$" + "".join(f".{name}[{number}]" for name, number in zip(("messages", "content"), place, strict=False))
