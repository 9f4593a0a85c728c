"""How fast the engine is: when requests end, to tell a refused one when to come back; how long prompts take."""

from __future__ import annotations

_SHARE = 0.1  # of the newest in the mean
_LEAST_S, _MOST_S = 0.1, 60.0
_PROMPT_SHARE = 0.3
_STEP_S = 0.4  # with an answer's token and a slice of a picture beside it, a step stays under a second
_GRAIN = 16  # tokens


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


class PromptPace:
    """A moving mean of the time that a token of a prompt takes, so that no step holds up other answers for long."""

    def __init__(self) -> None:
        self._mean_s: float | None = None

    def computed(self, took_s: float, tokens: int) -> None:
        """A step took so long, with so many tokens of prompts in it."""
        if tokens >= _GRAIN:
            here_s = took_s / tokens
            self._mean_s = here_s if self._mean_s is None else self._mean_s + _PROMPT_SHARE * (here_s - self._mean_s)

    def tokens(self, most: int) -> int:
        """Tokens of prompts for a step that others wait for; `most` before anything is known."""
        if self._mean_s is None:
            return most
        return min(most, max(_GRAIN, int(_STEP_S / self._mean_s) // _GRAIN * _GRAIN))
