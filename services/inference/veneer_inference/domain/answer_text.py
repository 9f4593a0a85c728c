"""An answer's text from its tokens, as they come: characters that span tokens, and texts that end the answer."""

import codecs
from collections.abc import Sequence
from typing import Protocol


class BytesByToken(Protocol):
    """Anything that gives the bytes of a token."""

    def __getitem__(self, token_id: int, /) -> bytes:
        """The bytes of a token id."""


class StopTexts:
    """Cuts a text before the first of some texts, however it is chopped up on its way.

    The first is the one that is complete first; of several that end at one place, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Takes the next characters; returns those that are no part of a stop text, whatever follows."""
        seen = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := seen.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return seen[: min(ends)[1]]
        held = max((_overlap(seen, stop) for stop in self._stops), default=0)
        cut = len(seen) - held
        self._held = seen[cut:]
        return seen[:cut]

    def rest(self) -> str:
        """The characters that were held back; after the last `push`."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """The text of one answer.

    Args:
        token_bytes: bytes by token id.
        stops: texts before which the answer ends.
    """

    def __init__(self, token_bytes: BytesByToken, stops: Sequence[str] = ()) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopTexts(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come; nothing may follow."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the characters that are certain now."""
        return self._stops.push(self._decoder.decode(self._bytes[token_id]))

    def rest(self) -> str:
        """What is left at the end: held-back characters, and U+FFFD for bytes of an unfinished one."""
        if self.stopped:
            return ""
        last = self._stops.push(self._decoder.decode(b"", True))
        return last if self.stopped else last + self._stops.rest()


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of a text with which a longer stop text begins."""
    most = min(len(text), len(stop) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(stop[:length])), 0)
