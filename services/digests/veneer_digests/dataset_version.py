"""The digest of a dataset version: which rows it holds in which split, in no order, duplicates kept."""

import hashlib

from veneer_digests.errors import DigestError
from veneer_digests.preimage import digest_bytes, domain, sized, unsigned, utf8

CANONICALISER_VERSION = 1
"""Version of the form `canonical_row` demands; part of every dataset version's digest."""

MAX_SPLIT_BYTES = 255

_DOMAIN = domain("dataset-version")


class DatasetVersionHasher:
    """Takes rows in any order, one at a time; 32 bytes (and Python's overhead: about 75) are kept of each."""

    def __init__(self) -> None:
        self._rows_by_split: dict[str, list[bytes]] = {}

    def add(self, split: str, row_digest: str) -> None:
        """Count one row in a split.

        Raises:
            DigestError: a split's name that is empty or over `MAX_SPLIT_BYTES` of UTF-8, or no digest.
        """
        row = digest_bytes(row_digest, "row digest")
        rows = self._rows_by_split.get(split)
        if rows is None:
            size_bytes = len(utf8(split, "split"))
            if not 0 < size_bytes <= MAX_SPLIT_BYTES:
                raise DigestError(f"split must be 1 to {MAX_SPLIT_BYTES} bytes of UTF-8, got {size_bytes}")
            rows = self._rows_by_split[split] = []
        rows.append(row)

    def hexdigest(self) -> str:
        """The digest of the rows added so far; more may follow."""
        digest = hashlib.sha256(_DOMAIN)
        digest.update(unsigned(CANONICALISER_VERSION, 4, "canonicaliser's version"))
        digest.update(unsigned(len(self._rows_by_split), 4, "number of splits"))
        for split, rows in sorted((split.encode("utf-8"), rows) for split, rows in self._rows_by_split.items()):
            rows.sort()
            digest.update(sized(split) + unsigned(len(rows), 8, "number of rows"))
            for row in rows:
                digest.update(row)
        return digest.hexdigest()
