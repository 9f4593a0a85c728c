import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer_inference.engine.scheduler import Limits, Piece, Scheduler, Sequence
from veneer_inference.engine.slots import AdapterSlots
from veneer_inference.ports import EngineError

RETRY_S = 3.0


def scheduler(slots: int = 2, **limits: int) -> Scheduler:
    bounds = {"context_length": 256, "blocks": 16, "block_tokens": 16} | limits
    return Scheduler(Limits(**bounds), AdapterSlots(slots, lambda digest: None, lambda digest: None))


def sequence(key: int, prompt: int = 10, answer: int = 6, tenant: str = "t", adapter: str = "") -> Sequence:
    return Sequence(key, tenant, adapter, prompt, answer)


def submit(target: Scheduler, *sequences: Sequence) -> None:
    for each in sequences:
        target.submit(each, RETRY_S)


def keys(sequences: list[Sequence]) -> list[int]:
    return [each.key for each in sequences]


def sizes(pieces: list[Piece]) -> list[tuple[int, int, int]]:
    return [(piece.sequence.key, piece.start, piece.tokens) for piece in pieces]


def compute(pieces: list[Piece]) -> None:
    for piece in pieces:
        answers = piece.ends and piece.sequence.answer_tokens > 0
        piece.sequence.computed += piece.tokens
        piece.sequence.length += answers


def test_memory_is_reserved_for_prompt_and_longest_answer() -> None:
    target = scheduler(blocks=4)
    submit(target, sequence(1, 10, 23), sequence(2, 10, 6), sequence(3))
    assert keys(target.admit()) == [1, 2]  # 3 blocks and 1
    assert target.blocks_in_use == 4
    assert len({block for each in target.running.values() for block in each.blocks}) == 4
    assert 0 not in target.running[1].blocks
    target.finish(2)
    assert keys(target.admit()) == [3]
    target.finish(1)
    target.finish(3)
    assert target.blocks_in_use == 0


def test_tenants_take_turns() -> None:
    target = scheduler(running=3)
    submit(
        target, *(sequence(key, tenant="a") for key in range(1, 5)), sequence(5, tenant="b"), sequence(6, tenant="c")
    )
    assert keys(target.admit()) == [1, 5, 6]
    for key in (1, 5, 6):
        target.finish(key)
    assert keys(target.admit()) == [2, 3, 4]


def test_nobody_overtakes_a_large_request() -> None:
    target = scheduler(blocks=4)
    submit(target, sequence(1, 30, 2))
    target.admit()
    submit(target, sequence(2, 40, 10, tenant="b"), sequence(3, tenant="c"))
    assert target.admit() == []
    target.finish(1)
    assert keys(target.admit()) == [2]


def test_a_slot_is_awaited() -> None:
    target = scheduler(slots=1)
    submit(target, sequence(1, adapter="x"), sequence(2, adapter="x"), sequence(3, adapter="y"), sequence(4))
    assert keys(target.admit()) == [1, 2]
    target.finish(1)
    assert target.admit() == []
    target.finish(2)
    assert keys(target.admit()) == [3, 4]


def test_answers_go_before_prompts_and_prompts_in_pieces() -> None:
    target = scheduler(blocks=64, step_tokens=20)
    submit(target, sequence(1, 10), sequence(2, 50))
    target.admit()
    pieces = target.plan()
    assert sizes(pieces) == [(1, 0, 10), (2, 0, 10)]
    assert [piece.ends for piece in pieces] == [True, False]
    compute(pieces)
    submit(target, sequence(3, 10))
    target.admit()
    assert sizes(target.plan()) == [(1, 10, 1), (2, 10, 19)]
    compute(target.plan())
    compute(target.plan())
    assert sizes(target.plan()) == [(1, 12, 1), (2, 48, 2), (3, 0, 10)]
    compute(target.plan())
    assert sizes(target.plan()) == [(1, 13, 1), (2, 50, 1), (3, 10, 1)]


def test_more_answers_than_the_budget_all_go_on_and_a_prompt_too() -> None:
    target = scheduler(blocks=64, step_tokens=2, running=4)
    submit(target, *(sequence(key, 1) for key in (1, 2, 3)))
    target.admit()
    compute(target.plan())
    assert sizes(target.plan()) == [(1, 1, 1), (2, 1, 1), (3, 0, 1)]
    compute(target.plan())
    submit(target, sequence(4, 5))
    target.admit()
    assert sizes(target.plan()) == [(1, 2, 1), (2, 2, 1), (3, 1, 1), (4, 0, 1)]


def test_prompts_give_way_where_others_wait() -> None:
    target = scheduler(blocks=64, step_tokens=40)
    submit(target, sequence(1, 10), sequence(2, 50))
    target.admit()
    assert sizes(target.plan(16)) == [(1, 0, 10), (2, 0, 6)]
    assert sizes(target.plan(100)) == [(1, 0, 10), (2, 0, 30)]


def test_guesses_are_computed_with_the_token_before_them() -> None:
    target = scheduler()
    submit(target, sequence(1))
    target.admit()
    compute(target.plan())
    target.running[1].draft = 3
    pieces = target.plan()
    assert sizes(pieces) == [(1, 10, 4)]
    assert pieces[0].ends


def test_a_prompt_waits_for_its_pictures() -> None:
    target = scheduler()
    submit(target, sequence(1), sequence(2))
    target.admit()
    target.running[1].ready = False
    assert sizes(target.plan()) == [(2, 0, 10)]
    target.running[1].ready = True
    assert sizes(target.plan()) == [(1, 0, 10), (2, 0, 10)]


def test_a_full_queue_refuses() -> None:
    target = scheduler(waiting=4, waiting_bytes=100)
    submit(target, sequence(1, tenant="a"), sequence(2, tenant="a"))
    with pytest.raises(EngineError, match="2 requests of this tenant wait, 2 may") as caught:
        submit(target, sequence(3, tenant="a"))
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_s == RETRY_S
    submit(target, sequence(4, tenant="b"), sequence(5, tenant="c"))
    with pytest.raises(EngineError, match="4 requests wait, 4 may"):
        submit(target, sequence(6, tenant="d"))
    target.finish(4)
    with pytest.raises(EngineError, match="prompts of 0 bytes wait, 100 may"):
        submit(target, Sequence(7, "d", "", 1, 1, size_bytes=101))
    submit(target, Sequence(8, "d", "", 1, 1, size_bytes=100))
    assert target.waiting == 4


def test_a_prompt_of_any_size_waits_alone() -> None:
    target = scheduler(waiting_bytes=100)
    submit(target, Sequence(1, "t", "", 1, 1, size_bytes=1000))
    assert keys(target.admit()) == [1]


def test_what_never_fits_is_refused() -> None:
    target = scheduler(context_length=100, blocks=4)
    assert target.answer_limit(10, 20) == 20
    assert target.answer_limit(10, 50) == 50
    with pytest.raises(EngineError, match="there is memory for 64 tokens") as caught:
        target.answer_limit(10, 60)
    assert caught.value.reason == "TOO_LONG"
    with pytest.raises(EngineError, match="the context is 100 tokens"):
        target.answer_limit(100, 1)
    assert scheduler(context_length=100).answer_limit(90, 60) == 10
    with pytest.raises(EngineError, match="the context is 100 tokens"):
        submit(target, sequence(1, 101, 0))


def test_finishing_what_is_not_there_does_nothing() -> None:
    assert scheduler().finish(7) is None


@settings(max_examples=60)
@given(st.data())
def test_nothing_leaks_and_every_request_ends(data: st.DataObject) -> None:
    """Arrivals, cancellations and steps in any order; then all is quiet."""
    target = scheduler(blocks=8, step_tokens=7, running=3)
    draw = data.draw
    alive: dict[int, Sequence] = {}
    for key in range(draw(st.integers(1, 25))):
        new = sequence(
            key, draw(st.integers(1, 40)), draw(st.integers(0, 30)), draw(st.sampled_from("ab")),
            draw(st.sampled_from(["", "x", "y", "z"])),
        )  # fmt: skip
        submit(target, new)
        alive[key] = new
        if draw(st.booleans()):
            doomed = draw(st.sampled_from(sorted(alive)))
            assert target.finish(doomed) is alive.pop(doomed)
        step(target, alive)
    for _ in range(3000):
        if not alive:
            break
        step(target, alive)
    assert not alive
    assert target.blocks_in_use == 0
    assert target.waiting == 0


def step(target: Scheduler, alive: dict[int, Sequence]) -> None:
    target.admit()
    blocks = [block for each in target.running.values() for block in each.blocks]
    assert len(blocks) == len(set(blocks)) == target.blocks_in_use <= 8
    pieces = target.plan()
    assert sum(piece.tokens for piece in pieces) <= 7
    compute(pieces)
    for each in list(target.running.values()):
        if each.computed >= each.prompt_tokens and each.length == each.prompt_tokens + each.answer_tokens:
            assert target.finish(each.key) is alive.pop(each.key)
