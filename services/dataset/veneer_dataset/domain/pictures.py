"""Pictures of a version in the making: each distinct one once, with what decoding it told."""

from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from veneer_processing.pixels import MAX_ASPECT_RATIO

TINY_EDGE = 28
EXTREME_RATIO = 20
NEAR_BITS = 2  # of 64 in which two perceptual hashes may differ

_BANDS = NEAR_BITS + 1  # two hashes within NEAR_BITS are equal in one of so many bands
_BAND_BITS = 64 // _BANDS
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


class PictureTable:
    """Distinct pictures by index, in the order in which rows first named them."""

    def __init__(self) -> None:
        self._indices: dict[bytes, int] = {}
        self._digests = bytearray()
        self._entries = array("q")  # the manifest's entry that named the picture first; -1: in the row itself
        self._facts: dict[int, PictureFacts] = {}

    def __len__(self) -> int:
        return len(self._indices)

    def index(self, digest: bytes, entry: int = -1) -> int:
        """The picture's index; a new one where it was not named before."""
        index = self._indices.setdefault(digest, len(self._indices))
        if index == len(self._entries):
            self._entries.append(entry)
            self._digests += digest
        return index

    def first_entry(self, index: int) -> int:
        """The manifest's entry that named a picture first."""
        return self._entries[index]

    def digests(self) -> Iterator[str]:
        """Digests in hex, by index."""
        return (digest.hex() for digest in self._indices)

    def digest(self, index: int) -> str:
        """A picture's digest in hex."""
        return self._digests[32 * index : 32 * index + 32].hex()

    def note(self, index: int, facts: PictureFacts) -> None:
        """Keeps what decoding a picture told."""
        self._facts[index] = facts

    def facts(self, index: int) -> PictureFacts:
        """What `note` kept."""
        return self._facts[index]

    def near_duplicates(self) -> set[int]:
        """Pictures that look like one with a smaller index: their hashes differ in at most NEAR_BITS bits."""
        bands: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(_BANDS)]
        near = set()
        for index in range(len(self)):
            code = self._facts[index].perceptual_hash
            if not code:
                continue
            for number, band in enumerate(bands):
                alike = band[code >> number * _BAND_BITS & (1 << _BAND_BITS) - 1]
                if any((code ^ other).bit_count() <= NEAR_BITS for other in alike):
                    near.add(index)
                if len(alike) < _MAX_CANDIDATES:
                    alike.append(code)
        return near


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
