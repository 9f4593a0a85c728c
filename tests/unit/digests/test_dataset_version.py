import hashlib
import struct
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_digests import DatasetVersionHasher, DigestError, NotCanonicalError

ROWS = [hashlib.sha256(bytes([index])).hexdigest() for index in range(3)]
# Names that would run into one another without their lengths.
PAIRS = st.tuples(st.sampled_from(["a", "ab", "b", "\U0001f600", "\ufb33"]), st.sampled_from(ROWS))


def version_digest(pairs: list[tuple[str, str]]) -> str:
    version = DatasetVersionHasher()
    for split, row in pairs:
        version.add(split, row)
    return version.hexdigest()


@given(st.lists(PAIRS, max_size=6), st.lists(PAIRS, max_size=6))
def test_is_the_identity_of_the_multiset(one: list[tuple[str, str]], other: list[tuple[str, str]]) -> None:
    assert (version_digest(one) == version_digest(other)) == (Counter(one) == Counter(other))


@given(st.lists(PAIRS, max_size=20).flatmap(lambda pairs: st.tuples(st.just(pairs), st.permutations(pairs))))
def test_order_is_no_part(both: tuple[list[tuple[str, str]], list[tuple[str, str]]]) -> None:
    assert version_digest(both[0]) == version_digest(both[1])


def test_the_bytes_are_those_of_the_page() -> None:
    low, high = sorted(ROWS[:2])
    preimage = (
        b"veneer.dataset-version.v1\0"
        + struct.pack(">II", 1, 2)
        + struct.pack(">I", 4) + b"test" + struct.pack(">Q", 1) + bytes.fromhex(ROWS[2])
        + struct.pack(">I", 5) + b"train" + struct.pack(">Q", 3) + bytes.fromhex(low + high + high)
    )  # fmt: skip
    pairs = [("train", high), ("test", ROWS[2]), ("train", low), ("train", high)]
    assert version_digest(pairs) == hashlib.sha256(preimage).hexdigest()


def test_may_be_read_before_the_last_row() -> None:
    version = DatasetVersionHasher()
    version.add("train", ROWS[2])
    version.add("train", ROWS[0])
    assert version.hexdigest() == version.hexdigest() == version_digest([("train", ROWS[0]), ("train", ROWS[2])])
    version.add("train", ROWS[1])
    assert version.hexdigest() == version_digest([("train", row) for row in ROWS])


@pytest.mark.parametrize("split", ["", "x" * 256, "\u20ac" * 86])
def test_the_name_of_a_split_is_bounded(split: str) -> None:
    with pytest.raises(DigestError, match="split must be 1 to 255 bytes of UTF-8"):
        DatasetVersionHasher().add(split, ROWS[0])


@pytest.mark.parametrize("row", ["", ROWS[0][:12], ROWS[0].upper(), ROWS[0] + "\n", bytes.fromhex(ROWS[0])])
def test_a_row_is_a_digest(row: object) -> None:
    with pytest.raises(NotCanonicalError, match="row digest must be 64 lower-case hex digits"):
        DatasetVersionHasher().add("train", row)  # type: ignore[arg-type]  # the point of the test
