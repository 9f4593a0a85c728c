import hashlib
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_digests import DigestError, NotCanonicalError, epoch_order, epoch_order_of_packed, split_of

U64 = st.integers(0, 2**64 - 1)
ROWS = [hashlib.sha256(bytes([index])).hexdigest() for index in range(50)]
DRAWN_ROWS = st.lists(st.sampled_from(ROWS[:8]), max_size=12)
SHARES = [("train", 8), ("validation", 1), ("test", 1)]


def fraction(group_key: str, seed: int) -> Fraction:
    key = group_key.encode()
    preimage = b"veneer.split.v1\0" + seed.to_bytes(8, "big") + len(key).to_bytes(4, "big") + key
    return Fraction(int(hashlib.sha256(preimage).hexdigest()[:16], 16), 2**64)


@given(U64, U64, DRAWN_ROWS)
def test_an_epoch_visits_each_row_once_in_the_order_of_the_page(seed: int, epoch: int, rows: list[str]) -> None:
    def key(index: int) -> tuple[str, int]:
        preimage = seed.to_bytes(8, "big") + epoch.to_bytes(8, "big") + bytes.fromhex(rows[index])
        return hashlib.sha256(preimage).hexdigest(), index

    assert epoch_order(seed, epoch, rows) == sorted(range(len(rows)), key=key)
    assert epoch_order_of_packed(seed, epoch, bytes.fromhex("".join(rows))) == epoch_order(seed, epoch, rows)


@given(U64, DRAWN_ROWS.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(rows))))
def test_what_an_epoch_visits_does_not_depend_on_the_order_of_rows(
    seed: int, both: tuple[list[str], list[str]]
) -> None:
    one, other = both
    assert [one[index] for index in epoch_order(seed, 0, one)] == [
        other[index] for index in epoch_order(seed, 0, other)
    ]


def test_seed_and_epoch_each_shuffle_anew() -> None:
    orders = [tuple(epoch_order(seed, epoch, ROWS)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64), (True, 0), (0.5, 0)])
def test_seed_and_epoch_are_u64(seed: int, epoch: int) -> None:
    with pytest.raises(DigestError, match=r"must be an integer in \[0, 2\^64\)"):
        epoch_order(seed, epoch, ROWS)


def test_an_epoch_orders_digests_only() -> None:
    with pytest.raises(NotCanonicalError, match="row digest must be 64"):
        epoch_order(0, 0, ["x"])
    with pytest.raises(DigestError, match="32 bytes each, got 33"):
        epoch_order_of_packed(0, 0, b"x" * 33)


@given(st.text(), U64, st.lists(st.integers(0, 2**50), min_size=1, max_size=5).filter(any))
def test_a_split_is_where_the_fraction_falls(group_key: str, seed: int, weights: list[int]) -> None:
    shares = [(f"s{index}", weight) for index, weight in enumerate(weights)]
    at = fraction(group_key, seed)
    index = int(split_of(group_key, shares, seed)[1:])
    assert Fraction(sum(weights[:index]), sum(weights)) <= at < Fraction(sum(weights[: index + 1]), sum(weights))


@given(st.text(), st.integers(2, 2**53 - 1))
def test_a_bound_is_exact(group_key: str, total: int) -> None:
    below = int(fraction(group_key, 0) * total)
    assert split_of(group_key, [("low", below), ("high", total - below)]) == "high"
    assert split_of(group_key, [("low", below + 1), ("high", total - below - 1)]) == "low"


def test_splits_have_about_their_shares() -> None:
    counts = Counter(split_of(str(key), SHARES) for key in range(10_000))
    assert abs(counts["train"] - 8000) < 200  # 5 standard deviations
    assert abs(counts["test"] - 1000) < 150


def test_another_seed_draws_anew() -> None:
    def drawn(seed: int) -> list[str]:
        return [split_of(row, SHARES, seed) for row in ROWS]

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ([], "add up to 1 to"),
        ([("a", 0)], "add up to 1 to"),
        ([("a", 2**53)], "add up to 1 to"),
        ([("a", 2), ("b", -1)], "weight of split 'b' must be an integer from 0, got -1"),
        ([("a", 0.5)], "must be an integer from 0, got 0.5"),
        ([("a", True)], "must be an integer from 0, got True"),
        ([("a", 1), ("a", 1)], "name a split twice"),
    ],
)
def test_shares_must_make_a_whole(shares: list[tuple[str, int]], problem: str) -> None:
    with pytest.raises(DigestError, match=problem):
        split_of("key", shares)


@pytest.mark.parametrize(("group_key", "seed"), [("\ud800", 0), (7, 0), ("key", -1), ("key", 2**64)])
def test_key_and_seed_are_checked(group_key: str, seed: int) -> None:
    with pytest.raises(DigestError):
        split_of(group_key, SHARES, seed)
