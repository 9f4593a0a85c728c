from veneer_trainer.domain.leases import ChangeWatch


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_time_counts_since_the_last_change() -> None:
    clock = Clock()
    watch = ChangeWatch(longest_gap_s=10, clock=clock)
    assert watch.unchanged_s("a", 1) == 0
    clock.now_s += 3
    watch.tick()
    assert watch.unchanged_s("a", 1) == 3
    assert watch.unchanged_s("a", 2) == 0
    clock.now_s += 2
    watch.tick()
    assert watch.unchanged_s("a", 2) == 2


def test_time_in_which_this_process_stood_still_counts_for_nobody() -> None:
    clock = Clock()
    watch = ChangeWatch(longest_gap_s=1, clock=clock)
    watch.unchanged_s("a", 1)
    clock.now_s += 3600
    watch.tick()
    assert watch.unchanged_s("a", 1) == 1


def test_what_is_not_kept_is_new_again() -> None:
    clock = Clock()
    watch = ChangeWatch(longest_gap_s=10, clock=clock)
    for thing in ("a", "b"):
        watch.unchanged_s(thing, 1)
    watch.keep({"a"})
    clock.now_s += 3
    watch.tick()
    assert (watch.unchanged_s("a", 1), watch.unchanged_s("b", 1)) == (3, 0)
