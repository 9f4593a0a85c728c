"""How fast the engine is: when requests end, to tell a refused one when to come back; what a step takes."""

from __future__ import annotations

_SHARE = 0.1  # of the newest in the mean
_LEAST_S, _MOST_S = 0.1, 60.0
_STEP_SHARE = 0.3
_STEP_S = 0.6  # a step with prompts or pictures in it, so that answers bring something each second
_LEAST_ROOM = 1 / 4  # for them, of what the answers take: they get on beside answers that take all of that
_GRAIN = 8  # tokens


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


class StepPace:
    """Moving means of what answers take of a step, and a token of a prompt: no step holds up answers for long."""

    def __init__(self) -> None:
        self._answers_s: float | None = None
        self._token_s: float | None = None

    @property
    def room_s(self) -> float:
        """For prompts and pictures in a step that answers wait for."""
        answers_s = self._answers_s or 0.0
        return max(_STEP_S - answers_s, answers_s * _LEAST_ROOM)

    def computed(self, took_s: float, answers: int, prompt_tokens: int) -> None:
        """A pass took so long, with a token of so many answers and so many tokens of prompts."""
        if answers and not prompt_tokens:
            self._answers_s = _moved(self._answers_s, took_s)
        if prompt_tokens >= _GRAIN:
            rest_s = took_s - (self._answers_s or 0.0) * bool(answers)
            self._token_s = _moved(self._token_s, max(rest_s, took_s / 10) / prompt_tokens)

    def tokens(self, most: int, seen_s: float = 0.0) -> int:
        """Tokens of prompts for a step that answers wait for; `most` before anything is known.

        Args:
            most: of a step.
            seen_s: what pictures have taken of it; some tokens are computed in a step without them, however long.
        """
        if self._token_s is None:
            return most
        tokens = int((self.room_s - seen_s) / self._token_s) // _GRAIN * _GRAIN
        return min(most, max(tokens, 0 if seen_s else _GRAIN))


def _moved(mean: float | None, here: float) -> float:
    return here if mean is None else mean + _STEP_SHARE * (here - mean)
