"""How long something has not changed, by this process's own monotonic clock.

A lease is lost when the heartbeats that the database counts have not grown for its duration; a run stalls when
its step has not grown. No clock of another machine takes part, and no wall clock: moving one changes nothing.
A new process has seen nothing yet, so every lease begins anew with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable


class ChangeWatch:
    """Remembers what things looked like and since when.

    Args:
        longest_gap_s: what passes between two ticks at most; when this process itself was stopped for longer,
            the rest counts for nobody.
        clock: monotonic seconds.
    """

    def __init__(self, longest_gap_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest_gap_s = longest_gap_s
        self._clock = clock
        self._last_s = clock()
        self._watched_s = 0.0
        self._seen: dict[Hashable, tuple[Hashable, float]] = {}

    def tick(self) -> None:
        """Lets time pass; call it before a round of looking."""
        now_s = self._clock()
        self._watched_s += min(now_s - self._last_s, self._longest_gap_s)
        self._last_s = now_s

    def unchanged_s(self, thing: Hashable, look: Hashable) -> float:
        """Returns for how many seconds a thing has looked as it looks now; 0 when it is new or has changed."""
        seen = self._seen.get(thing)
        if seen is None or seen[0] != look:
            self._seen[thing] = (look, self._watched_s)
            return 0.0
        return self._watched_s - seen[1]

    def keep(self, things: Collection[Hashable]) -> None:
        """Forgets all other things."""
        self._seen = {thing: seen for thing, seen in self._seen.items() if thing in things}
