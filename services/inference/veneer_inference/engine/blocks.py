"""Key-value blocks: who holds which, and what is kept of those that nobody holds. Without torch.

A full block is named by a key that stands for everything its keys and values depend on (`prefix`). A later sequence
that begins with the same keys shares those blocks. A block that nobody holds keeps its content until another sequence
needs the room: the one that was let go of longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Blocks 1 to `blocks` with reference counts.

    Args:
        blocks: how many there are.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._free = list(range(blocks, 0, -1))
        self._references: dict[int, int] = {}
        self._block: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # with content; the first goes first

    @property
    def in_use(self) -> int:
        """Blocks that sequences hold; a shared one counts once."""
        return len(self._references)

    def take(self, count: int, keys: Sequence[bytes] = ()) -> tuple[list[int], int] | None:
        """Blocks for a sequence; None, and nothing is taken, where there is no room.

        Args:
            count: how many.
            keys: of the first of them, as far as they may be shared.

        Returns:
            The blocks in the order of the sequence, and how many of them have their content already.
        """
        shared: list[int] = []
        for key in keys[:count]:
            if (block := self._block.get(key)) is None:
                break
            shared.append(block)
        fresh = count - len(shared)
        if fresh > len(self._free) + len(self._unused) - sum(block in self._unused for block in shared):
            return None
        for block in shared:
            self._unused.pop(block, None)
            self._references[block] = self._references.get(block, 0) + 1
        blocks = shared + sorted(self._fresh() for _ in range(fresh))  # neighbours in order are read in one go
        return blocks, len(shared)

    def publish(self, block: int, key: bytes) -> None:
        """A held block is full, and may be shared under its key; nothing where another one has that key."""
        if key not in self._block and block not in self._key:
            self._block[key] = block
            self._key[block] = key

    def give_back(self, blocks: Sequence[int]) -> None:
        """A sequence lets go of its blocks."""
        for block in reversed(blocks):  # a sequence's end is of use to fewer than its beginning: it goes first
            self._references[block] -= 1
            if self._references[block]:
                continue
            del self._references[block]
            if block in self._key:
                self._unused[block] = None
            else:
                self._free.append(block)

    def _fresh(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._unused.popitem(last=False)
            del self._block[self._key.pop(block)]
        self._references[block] = 1
        return block
