"""A file that is kept: where it is in its folder, and what it must hash to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file by its path within a folder, its SHA-256 in hex, and its size."""

    path: str
    digest: str
    size_bytes: int
