"""The pieces every hashed byte string is made of: domains, integers, texts, other digests.

Owns the framing of protos/DIGESTS.md, "Pieces". What goes into which digest is its owner's matter.
"""

import re

from veneer_digests.errors import DigestError, NotCanonicalError, shown

_DIGEST = re.compile(r"[0-9a-f]{64}")


def domain(kind: str) -> bytes:
    """The bytes a preimage starts with; a NUL ends them, so that no kind's are a prefix of another's."""
    return f"veneer.{kind}.v1\0".encode("ascii")


def unsigned(value: int, size_bytes: int, what: str) -> bytes:
    """`value` as a big-endian unsigned integer of `size_bytes`; raises `DigestError` outside its range."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 8 * size_bytes:
        raise DigestError(f"{what} must be an integer in [0, 2^{8 * size_bytes}), got {shown(value)}")
    return value.to_bytes(size_bytes, "big")


def utf8(text: object, what: str) -> bytes:
    """`text` in UTF-8, not normalised; raises `NotCanonicalError` for a lone surrogate and for no text."""
    if not isinstance(text, str):
        raise NotCanonicalError(f"{what} must be a string, got {shown(text)}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotCanonicalError(f"{what} has a lone surrogate at character {error.start}") from error


def sized(data: bytes) -> bytes:
    """`data` after its length in bytes, a u32."""
    return unsigned(len(data), 4, "length in bytes") + data


def digest_bytes(text: object, what: str = "digest") -> bytes:
    """The 32 bytes of a digest's text; raises `NotCanonicalError` unless it is 64 lower-case hex digits."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise NotCanonicalError(f"{what} must be 64 lower-case hex digits, got {shown(text)}")
    return bytes.fromhex(text)
