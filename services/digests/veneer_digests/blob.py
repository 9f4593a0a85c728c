"""The digest of a blob: plain SHA-256 of its bytes, what `sha256sum` prints."""

import hashlib
from io import BufferedIOBase


def blob_digest(blob: bytes | bytearray | memoryview | BufferedIOBase) -> str:
    """SHA-256 of bytes, or of an open binary file from where it stands, read in pieces; 64 hex digits."""
    if isinstance(blob, bytes | bytearray | memoryview):
        return hashlib.sha256(blob).hexdigest()
    return hashlib.file_digest(blob, "sha256").hexdigest()
