"""One suite for every WorkQueue."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from veneer_trainer.domain.fair_share import Lane
from veneer_trainer.ports import WorkQueue

LANE = Lane("acme", "trainingJobs", "normal", "d1", "float32", 2)
Make = Callable[[Mapping[str, float]], WorkQueue]


def anything(lane: Lane) -> bool:
    return True


def drain(queue: WorkQueue, can_run: Callable[[Lane], bool] = anything) -> list[str]:
    taken = []
    while (uid := queue.take("w", can_run)) is not None:
        queue.forget(uid)
        taken.append(uid)
    return taken


def test_first_come_first_served(queue: WorkQueue) -> None:
    for uid in ("a", "b", "c"):
        assert queue.add(uid, LANE)
    assert drain(queue) == ["a", "b", "c"]
    assert queue.take("w", anything) is None


def test_what_is_there_is_not_added_again_waiting_or_taken(queue: WorkQueue) -> None:
    assert queue.add("a", LANE)
    assert not queue.add("a", LANE)
    assert queue.take("w", anything) == "a"
    assert not queue.add("a", LANE)
    assert queue.take("w", anything) is None
    queue.forget("a")
    assert queue.add("a", LANE)


def test_contents_tell_the_waiting_from_the_taken(queue: WorkQueue) -> None:
    queue.add("a", LANE)
    queue.add("b", replace(LANE, tenant="other"))
    taken = queue.take("w", lambda lane: lane.tenant == "other")
    assert taken == "b"
    assert queue.contents().waiting == {"a"}
    assert queue.contents().taken == {"b"}


def test_put_back_work_waits_at_the_end_and_only_taken_work_moves(queue: WorkQueue) -> None:
    for uid in ("a", "b"):
        queue.add(uid, LANE)
    queue.put_back("a")
    assert queue.take("w", anything) == "a"
    queue.put_back("a")
    queue.put_back("a")
    queue.put_back("unknown")
    assert drain(queue) == ["b", "a"]


def test_forgotten_work_is_gone_wherever_it_was(queue: WorkQueue) -> None:
    for uid in ("a", "b"):
        queue.add(uid, LANE)
    queue.forget("b")
    queue.forget("unknown")
    assert drain(queue) == ["a"]
    contents = queue.contents()
    assert not contents.waiting
    assert not contents.taken


def test_a_worker_gets_only_what_it_can_run(queue: WorkQueue) -> None:
    queue.add("big", replace(LANE, memory_gib=64))
    queue.add("small", LANE)
    assert drain(queue, lambda lane: lane.memory_gib <= 8) == ["small"]
    assert drain(queue) == ["big"]


def test_high_goes_first_within_its_tenant_and_low_when_nothing_else_waits(queue: WorkQueue) -> None:
    other = replace(LANE, tenant="zebra")
    queue.add("low", replace(LANE, priority="low"))
    for uid in ("normal", "normal2"):
        queue.add(uid, LANE)
    queue.add("high", replace(LANE, priority="high"))
    for uid in ("other", "other2"):
        queue.add(uid, other)
    # acme's high work does not pass the other tenant's turn
    assert drain(queue) == ["high", "other", "normal", "other2", "normal2", "low"]


def test_within_a_tenant_the_longest_waiting_lane_goes_first(queue: WorkQueue) -> None:
    lanes = [replace(LANE, model_digest=digest) for digest in ("z", "a", "m")]
    for turn in range(6):
        queue.add(str(turn), lanes[turn % 3])
        time.sleep(0.002)  # entries of one millisecond are alike to Redis
    assert drain(queue) == [str(turn) for turn in range(6)]


def test_turns_follow_the_weights(make_queue: Make) -> None:
    queue = make_queue({"heavy": 3.0})
    for index in range(40):
        queue.add(f"heavy-{index}", replace(LANE, tenant="heavy"))
        queue.add(f"light-{index}", replace(LANE, tenant="light"))
    first = Counter(uid.split("-")[0] for uid in drain(queue)[:40])
    assert first == {"heavy": 30, "light": 10}


def test_a_tenant_that_idled_has_saved_nothing_up(queue: WorkQueue) -> None:
    for index in range(20):
        queue.add(f"busy-{index}", replace(LANE, tenant="busy"))
    for _ in range(10):
        queue.forget(str(queue.take("w", anything)))
    for index in range(10):
        queue.add(f"late-{index}", replace(LANE, tenant="late"))
    first = Counter(uid.split("-")[0] for uid in drain(queue)[:10])
    assert first == {"busy": 5, "late": 5}


def test_no_two_callers_take_the_same(queue: WorkQueue) -> None:
    uids = {str(index) for index in range(120)}
    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(lambda uid: queue.add(uid, LANE), sorted(uids) * 2))
        assert sum(added) == len(uids)
        taken = [uid for some in pool.map(lambda _: drain(queue), range(8)) for uid in some]
    assert Counter(taken) == Counter(uids)


def test_lanes_are_those_where_something_waits(queue: WorkQueue) -> None:
    other = replace(LANE, tenant="other", shares="0a1b")
    queue.add("a", LANE)
    queue.add("b", other)
    assert queue.lanes() == {LANE, other}
    queue.take("w", lambda lane: lane == other)
    queue.forget("b")
    assert queue.lanes() == {LANE}


def test_a_lane_of_before_jobs_shared_is_read() -> None:
    assert Lane.parse("acme|trainingJobs|normal|d1|float32|2") == LANE
