"""Which adapters are in a slot, ready for the next step. Without torch.

A slot is taken for as long as a running request wears its adapter, and keeps the adapter after that until another one
needs it: the one that was used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

BASE = ""  # wears nothing and needs no slot


class AdapterSlots:
    """A fixed number of slots with reference counts.

    Args:
        count: of the slots.
        enter: puts the adapter of a digest in place.
        leave: takes it away.
    """

    def __init__(self, count: int, enter: Callable[[str], None], leave: Callable[[str], None]) -> None:
        self.count = count
        self._enter = enter
        self._leave = leave
        self._references: OrderedDict[str, int] = OrderedDict()  # the first was used longest ago

    def __contains__(self, digest: str) -> bool:
        return digest in self._references

    def references(self, digest: str) -> int:
        """Running requests that wear it."""
        return self._references.get(digest, 0)

    def acquire(self, digest: str) -> bool:
        """Takes a slot for a running request; False while every slot is in use by other adapters."""
        if digest == BASE:
            return True
        if digest not in self._references:
            if len(self._references) >= self.count and not self._make_room():
                return False
            self._enter(digest)
            self._references[digest] = 0
        self._references[digest] += 1
        self._references.move_to_end(digest)
        return True

    def release(self, digest: str) -> None:
        """A running request ended."""
        if digest != BASE:
            self._references[digest] -= 1

    def drop(self, digest: str) -> None:
        """Takes an adapter out of its slot, if it is in one.

        Raises:
            ValueError: a running request wears it.
        """
        if self.references(digest):
            raise ValueError(f"{digest} is in use by {self.references(digest)} requests")
        if self._references.pop(digest, None) is not None:
            self._leave(digest)

    def _make_room(self) -> bool:
        for digest, references in self._references.items():
            if references == 0:
                self.drop(digest)
                return True
        return False
