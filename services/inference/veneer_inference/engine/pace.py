"""How fast requests end, to tell a refused one when to come back."""

from __future__ import annotations

_SHARE = 0.1  # of the newest in the mean
_LEAST_S, _MOST_S = 0.1, 60.0


class Pace:
    """A moving mean of the time from one request's end to the next."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._mean_s = _LEAST_S

    def ended(self, now_s: float, *, more: bool) -> None:
        """A request ended; where there are no more, the time until the next one says nothing."""
        if self._last_s is not None:
            self._mean_s += _SHARE * (now_s - self._last_s - self._mean_s)
        self._last_s = now_s if more else None

    def wait_s(self, requests: int) -> float:
        """When so many requests will have ended, at this pace."""
        return min(max(requests * self._mean_s, _LEAST_S), _MOST_S)
