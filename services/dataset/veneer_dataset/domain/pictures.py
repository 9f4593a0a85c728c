"""Pictures of a version in the making: each distinct one once, with what decoding it told."""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from veneer_processing.pixels import MAX_ASPECT_RATIO

TINY_EDGE = 28
EXTREME_RATIO = 20
NEAR_BITS = 2  # of 64 in which two perceptual hashes may differ
NEAR_EDGE = 128  # pixels of the shorter edge; of smaller pictures, icons above all, 72 samples say too little

_BANDS = NEAR_BITS + 1  # two hashes within NEAR_BITS are equal in one of so many bands
_BAND_BITS = 64 // _BANDS
_FIRST_SLOTS = 1024  # a power of two
_MAX_CANDIDATES = 64  # of one band; blank pages by the thousand would else cost the square


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What a file turned out to be: upright width and height in pixels and a perceptual hash, or a refusal.

    The hash is dHash (N. Krawetz, "Kind of Like That", 2013): of 9x8 grey samples, which of two neighbours in a
    row is brighter; 64 bits. 0 says nothing: the picture is flat.
    """

    width: int = 0
    height: int = 0
    perceptual_hash: int = 0
    code: str = ""
    found: str = ""


class Digests(Sequence[str]):
    """Distinct digests in hex, sorted: a million of them take 32 MB, where a set of texts takes 170.

    Args:
        packed: 32 bytes for each, in order.
    """

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed) // 32

    @overload
    def __getitem__(self, at: int) -> str: ...

    @overload
    def __getitem__(self, at: slice) -> list[str]: ...

    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        place = range(len(self))[at]
        return self._packed[32 * place : 32 * place + 32].hex()

    def __contains__(self, digest: object) -> bool:
        if not isinstance(digest, str):
            return False
        place = bisect_left(self, digest)
        return place < len(self) and self[place] == digest


class PictureTable:
    """Distinct pictures by index, in the order in which rows first named them.

    A million of them take 60 MB: columns, and a hash table of indices (open addressing, linear probing) in place of
    a dict of a million digests.
    """

    def __init__(self) -> None:
        self._slots = array("i", [0]) * _FIRST_SLOTS  # index + 1 of the picture; 0: free
        self._digests = bytearray()
        self._entries = array("q")  # the manifest's entry that named the picture first; -1: in the row itself
        self._widths, self._heights, self._hashes = array("I"), array("I"), array("Q")
        self._refusals: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def index(self, digest: bytes, entry: int = -1) -> int:
        """The picture's index; a new one where it was not named before."""
        slot = self._slot(digest)
        if not self._slots[slot]:
            self._entries.append(entry)
            self._digests += digest
            for column in (self._widths, self._heights, self._hashes):
                column.append(0)
            self._slots[slot] = len(self)
            if 2 * len(self) > len(self._slots):
                self._grow()
            return len(self) - 1
        return self._slots[slot] - 1

    def first_entry(self, index: int) -> int:
        """The manifest's entry that named a picture first."""
        return self._entries[index]

    def digests(self) -> Iterator[str]:
        """Digests in hex, by index."""
        return map(self.digest, range(len(self)))

    def digest(self, index: int) -> str:
        """A picture's digest in hex."""
        return self._digests[32 * index : 32 * index + 32].hex()

    def chosen(self, which_N: NDArray[np.bool_]) -> Digests:
        """The digests of some pictures, marked by index."""
        words_N_4 = np.frombuffer(self._digests, ">u8").reshape(-1, 4)[which_N]
        return Digests(words_N_4[np.lexsort(words_N_4.T[::-1])].tobytes())

    def note(self, index: int, facts: PictureFacts) -> None:
        """Keeps what decoding a picture told."""
        self._widths[index], self._heights[index] = facts.width, facts.height
        self._hashes[index] = facts.perceptual_hash
        if facts.code:
            self._refusals[index] = facts.code, facts.found

    def facts(self, index: int) -> PictureFacts:
        """What `note` kept."""
        code, found = self._refusals.get(index, ("", ""))
        return PictureFacts(self._widths[index], self._heights[index], self._hashes[index], code, found)

    def size(self, digest: str) -> tuple[int, int]:
        """Width and height of a picture by its digest in hex."""
        index = self.index(bytes.fromhex(digest))
        return self._widths[index], self._heights[index]

    def near_duplicates(self) -> NDArray[np.int32]:
        """For each picture the first one that it looks like: one of a smaller index, or -1 where there is none.

        Two look alike when their hashes differ in at most NEAR_BITS bits, and both have edges of NEAR_EDGE at least. In
        each band those with equal bits are sorted together and compared with up to _MAX_CANDIDATES before them.
        """
        none = np.int32(len(self))
        first = np.full(len(self), none, np.int32)
        if not len(self):
            return first
        hashes = np.frombuffer(self._hashes, np.uint64)
        edges = np.minimum(np.frombuffer(self._widths, np.uint32), np.frombuffer(self._heights, np.uint32))
        known = np.flatnonzero((hashes != 0) & (edges >= NEAR_EDGE)).astype(np.int32)
        codes = hashes[known]
        for number in range(_BANDS):
            band = codes >> np.uint64(number * _BAND_BITS) & np.uint64((1 << _BAND_BITS) - 1)
            order = np.argsort(band, kind="stable")
            band, sorted_codes, indices = band[order], codes[order], known[order]
            for ahead in range(1, _MAX_CANDIDATES + 1):
                same = np.flatnonzero(band[ahead:] == band[:-ahead])
                if not len(same):
                    break
                apart = np.bitwise_count(sorted_codes[same + ahead] ^ sorted_codes[same])
                alike = same[apart <= NEAR_BITS]
                later = indices[alike + ahead]  # each but once
                first[later] = np.minimum(first[later], indices[alike])
        first[first == none] = -1
        return first

    def _slot(self, digest: bytes) -> int:
        """Where a digest is, or would be. A submitter chooses digests, but not Python's hashes of them."""
        mask = len(self._slots) - 1
        slot = hash(digest) & mask
        while (found := self._slots[slot]) and self._digests[32 * found - 32 : 32 * found] != digest:
            slot = slot + 1 & mask
        return slot

    def _grow(self) -> None:
        self._slots = array("i", [0]) * (2 * len(self._slots))
        for index in range(len(self)):
            self._slots[self._slot(bytes(self._digests[32 * index : 32 * index + 32]))] = index + 1


def shape_warning(facts: PictureFacts) -> tuple[str, str] | None:
    """Code and finding of a picture that is oddly small or long."""
    size = f"{facts.width}x{facts.height}"
    if min(facts.width, facts.height) < TINY_EDGE:
        return "PICTURE_TINY", size
    if max(facts.width, facts.height) > EXTREME_RATIO * min(facts.width, facts.height):
        return "PICTURE_EXTREME", size
    return None


def is_too_thin(facts: PictureFacts) -> bool:
    """Whether no model's resize takes the picture."""
    return max(facts.width, facts.height) > MAX_ASPECT_RATIO * min(facts.width, facts.height)
