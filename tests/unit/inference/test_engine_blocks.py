"""Blocks are shared and kept, never lost, never given to two who differ."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer_inference.engine.blocks import BlockPool
from veneer_inference.engine.prefix import BlockKeys


def test_a_beginning_is_shared_and_kept() -> None:
    pool = BlockPool(6)
    first = pool.take(3, [b"a", b"b"])
    assert first is not None
    blocks, shared = first
    assert (len(blocks), shared) == (3, 0)
    pool.publish(blocks[0], b"a")
    pool.publish(blocks[1], b"b")
    assert pool.take(2, [b"a", b"x"]) == ([blocks[0], 4], 1)
    assert pool.in_use == 4
    pool.give_back(blocks)
    pool.give_back([blocks[0], 4])
    assert pool.in_use == 0
    again = pool.take(3, [b"a", b"b", b"c"])
    assert again is not None
    assert again[0][:2] == blocks[:2]
    assert again[1] == 2


def test_what_was_let_go_of_longest_ago_goes_first_and_a_beginning_after_its_end() -> None:
    pool = BlockPool(4)
    for name in (b"a", b"b"):
        taken = pool.take(2)
        assert taken is not None
        for number, block in enumerate(taken[0]):
            pool.publish(block, name + b"%d" % number)
        pool.give_back(taken[0])
    assert pool.take(1) is not None  # takes the end of a
    kept = pool.take(2, [b"a0", b"a1"])
    assert kept is not None
    assert kept[1] == 1


def test_blocks_that_were_kept_come_back_as_neighbours() -> None:
    """A sequence's keys are read where they lie: the fewer places, the better."""
    pool = BlockPool(4)
    taken = pool.take(4)
    assert taken is not None
    for block in taken[0]:
        pool.publish(block, b"%d" % block)
    pool.give_back(taken[0])
    assert pool.take(3) == ([2, 3, 4], 0)


def test_room_is_counted_without_what_would_be_shared() -> None:
    pool = BlockPool(2)
    taken = pool.take(1)
    assert taken is not None
    pool.publish(taken[0][0], b"a")
    pool.give_back(taken[0])
    assert pool.take(3, [b"a"]) is None
    assert pool.in_use == 0
    assert pool.take(2, [b"a"]) is not None


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=40))
def test_no_block_is_lost_or_held_by_two_who_differ(actions: list[tuple[int, int, bool]]) -> None:
    """Sequences whose blocks hold their own name and number; what is shared says what its key says."""
    pool = BlockPool(8)
    content: dict[int, bytes] = {}
    held: list[list[int]] = []
    for name, count, ends in actions:
        keys = [b"%d/%d" % (name, number) for number in range(count)]
        if ends and held:
            pool.give_back(held.pop(0))
        taken = pool.take(count, keys[:-1])
        if taken is None:
            continue
        blocks, shared = taken
        assert [content[block] for block in blocks[:shared]] == keys[:shared]
        others = {block for each in held for block in each}
        assert not others & set(blocks[shared:])
        for block, key in zip(blocks[shared:], keys[shared:], strict=True):
            content[block] = key
            pool.publish(block, key)
        held.append(blocks)
        assert pool.in_use == len({block for each in held for block in each})
    for each in held:
        pool.give_back(each)
    assert pool.in_use == 0
    everything = pool.take(8)
    assert everything is not None
    assert sorted(everything[0]) == list(range(1, 9))


IDS = np.arange(40)
POSITIONS = np.tile(IDS, (3, 1))
PICTURES = [(5, "d1", (1, 4, 4)), (20, "d2", (1, 2, 2))]


def keys(
    tenant: str = "t", adapter: str = "a", ids: object = IDS, positions: object = POSITIONS, pictures: object = PICTURES
) -> list[bytes]:
    return BlockKeys(tenant, adapter, 16, pictures).upto(40, ids, positions)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({}, 2),
        ({"tenant": "u"}, 0),
        ({"adapter": ""}, 0),
        ({"tenant": "ta", "adapter": ""}, 0),
        ({"ids": np.where(IDS == 15, 99, IDS)}, 0),
        ({"ids": np.where(IDS == 16, 99, IDS)}, 1),
        ({"ids": np.where(IDS == 32, 99, IDS)}, 2),
        ({"positions": POSITIONS + (np.arange(3) == 2)[:, None]}, 0),
        ({"pictures": [(5, "d1", (1, 2, 8)), PICTURES[1]]}, 0),
        ({"pictures": [PICTURES[0], (20, "d3", (1, 2, 2))]}, 1),
    ],
)
def test_keys_are_those_of_everything_before(other: dict[str, object], same: int) -> None:
    mine, others = keys(), keys(**other)
    assert len(mine) == len(others) == 2
    assert [left == right for left, right in zip(mine, others, strict=True)] == [True] * same + [False] * (2 - same)


def test_keys_of_a_growing_sequence_are_those_of_the_whole() -> None:
    growing = BlockKeys("t", "a", 16, PICTURES)
    assert growing.upto(10, IDS, POSITIONS) == []
    assert growing.upto(17, IDS, POSITIONS) == keys()[:1]
    assert growing.upto(40, IDS, POSITIONS) == keys()
