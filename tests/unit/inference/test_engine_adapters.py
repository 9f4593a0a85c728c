"""Slots and memory of adapters: what is in use stays."""

import pytest

from veneer_inference.engine.adapter_memory import AdapterMemory
from veneer_inference.engine.slots import AdapterSlots
from veneer_inference.ports import EngineError


@pytest.fixture
def moves() -> list[str]:
    return []


@pytest.fixture
def slots(moves: list[str]) -> AdapterSlots:
    return AdapterSlots(2, lambda digest: moves.append(f"+{digest}"), lambda digest: moves.append(f"-{digest}"))


@pytest.fixture
def memory(moves: list[str]) -> AdapterMemory[str]:
    return AdapterMemory(100, moves.append)


def test_the_slot_that_was_used_longest_ago_goes_first(slots: AdapterSlots, moves: list[str]) -> None:
    for digest in ("a", "b", "a"):
        assert slots.acquire(digest)
        slots.release(digest)
    assert slots.acquire("c")
    assert moves == ["+a", "+b", "-b", "+c"]
    assert "a" in slots
    assert "b" not in slots


def test_a_slot_in_use_is_never_taken(slots: AdapterSlots, moves: list[str]) -> None:
    assert slots.acquire("a")
    assert slots.acquire("b")
    assert not slots.acquire("c")
    assert slots.acquire("a")
    slots.release("a")
    assert not slots.acquire("c")
    slots.release("a")
    assert slots.acquire("c")
    assert moves == ["+a", "+b", "-a", "+c"]
    with pytest.raises(ValueError, match="b is in use by 1 requests"):
        slots.drop("b")
    slots.drop("never there")


def test_the_base_needs_no_slot(slots: AdapterSlots) -> None:
    assert all(slots.acquire(each) for each in ("a", "b", "", ""))
    slots.release("")
    assert "" not in slots


def test_what_is_unused_longest_makes_room(memory: AdapterMemory[str], moves: list[str]) -> None:
    for digest in "abc":
        memory.add(digest, digest.upper(), 30, 1)
    memory.acquire("a")
    memory.release("a")
    memory.add("d", "D", 60, 1)
    assert moves == ["b", "c"]
    assert memory.size_bytes == 90
    assert memory["a"] == "A"
    assert memory.evictions == 2


def test_what_is_used_stays(memory: AdapterMemory[str], moves: list[str]) -> None:
    memory.add("a", "A", 60, 1)
    memory.acquire("a")
    with pytest.raises(EngineError, match="adapters in use have 60 of 100 bytes, 50 more are needed") as caught:
        memory.add("b", "B", 50, 7.0)
    assert (caught.value.reason, caught.value.retry_s) == ("QUEUE_FULL", 7.0)
    with pytest.raises(EngineError, match="101 bytes") as caught:
        memory.add("c", "C", 101, 7.0)
    assert (caught.value.reason, caught.value.retry_s) == ("ADAPTER_INVALID", None)
    assert not moves
    memory.release("a")
    memory.add("b", "B", 50, 7.0)
    assert moves == ["a"]


def test_what_is_used_stays_though_it_came_first(memory: AdapterMemory[str], moves: list[str]) -> None:
    memory.add("a", "A", 30, 1)
    memory.acquire("a")
    memory.add("b", "B", 30, 1)
    memory.add("c", "C", 60, 1)
    assert moves == ["b"]
    assert memory["a"] == "A"


def test_a_retired_adapter_takes_no_new_request_and_goes_with_its_last(
    memory: AdapterMemory[str], moves: list[str]
) -> None:
    memory.add("a", "A", 60, 1)
    memory.acquire("a")
    memory.retire("a")
    assert not moves
    with pytest.raises(EngineError, match="adapter a is not loaded"):
        memory.acquire("a")
    assert memory.held() == [("a", 1, 60)]
    memory.release("a")
    assert moves == ["a"]
    assert memory.held() == []
    memory.retire("a")


def test_a_retired_adapter_that_is_asked_for_again_stays(memory: AdapterMemory[str], moves: list[str]) -> None:
    memory.add("a", "A", 60, 1)
    memory.acquire("a")
    memory.retire("a")
    assert memory.revive("a") == 60
    memory.acquire("a")
    memory.release("a")
    memory.release("a")
    assert not moves
    assert memory.revive("b") is None
