"""Choices drawn from content, the same everywhere: the order of an epoch, and the split of a row."""

import hashlib
from collections.abc import Sequence

from veneer_digests.errors import DigestError, shown
from veneer_digests.preimage import digest_bytes, domain, sized, unsigned, utf8

_SPLIT_DOMAIN = domain("split")
_MAX_WEIGHT = 2**53 - 1


def epoch_order(seed: int, epoch: int, row_digests: Sequence[str]) -> list[int]:
    """The order in which an epoch visits rows: indices into `row_digests`.

    Ascending SHA-256(seed as u64 || epoch as u64 || row digest); equal rows keep their order of occurrence.
    So the sequence of digests visited does not depend on the order given.

    Raises:
        DigestError: a seed or an epoch outside [0, 2^64), or no digest.
    """
    return epoch_order_of_packed(seed, epoch, b"".join(digest_bytes(row, "row digest") for row in row_digests))


def epoch_order_of_packed(seed: int, epoch: int, row_digests: bytes) -> list[int]:
    """As `epoch_order`, of digests one after another, 32 bytes each.

    Raises:
        DigestError: a seed or an epoch outside [0, 2^64), or bytes of no whole number of digests.
    """
    prefix = unsigned(seed, 8, "seed") + unsigned(epoch, 8, "epoch")
    if len(row_digests) % 32:
        raise DigestError(f"packed digests must be 32 bytes each, got {len(row_digests)} bytes")
    sha256 = hashlib.sha256
    keys = [sha256(prefix + row_digests[at : at + 32]).digest() for at in range(0, len(row_digests), 32)]
    return sorted(range(len(keys)), key=keys.__getitem__)


def split_of(group_key: str, shares: Sequence[tuple[str, int]], seed: int = 0) -> str:
    """The split of every row with this group key, by content alone: adding rows moves no other row.

    The first 8 bytes of SHA-256(domain || seed || group key) are h, a fraction h / 2^64 of the whole; the
    shares, in the order given, cut the whole in proportion to their weights. All in integers, so exact.

    Args:
        group_key: what must not be torn apart, such as the digest of a row's first picture.
        shares: (split, weight); a weight of 0 takes nothing.
        seed: another seed draws anew.

    Raises:
        DigestError: no weight above 0, a sum beyond 2^53-1, a split named twice, or a seed outside [0, 2^64).
    """
    if len({split for split, _ in shares}) != len(shares):
        raise DigestError("shares name a split twice")
    for split, weight in shares:
        if not isinstance(weight, int) or isinstance(weight, bool) or weight < 0:
            raise DigestError(f"weight of split {shown(split)} must be an integer from 0, got {shown(weight)}")
    total = sum(weight for _, weight in shares)
    if not 0 < total <= _MAX_WEIGHT:
        raise DigestError(f"weights must add up to 1 to 2^53-1, got {shown(total)}")
    preimage = _SPLIT_DOMAIN + unsigned(seed, 8, "seed") + sized(utf8(group_key, "group key"))
    position = int.from_bytes(hashlib.sha256(preimage).digest()[:8], "big") * total
    bound = 0
    for split, weight in shares:
        bound += weight
        if position < bound << 64:
            return split
    raise AssertionError("a fraction below 1 lies below the last bound")
