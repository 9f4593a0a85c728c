"""What a key-value block may be shared by: names for the blocks of a sequence. Without torch.

The key of a block is SHA-256 over the key of the block before it, the block's token ids and positions, and digest and
grid of each picture that begins in it. The first follows tenant and adapter: blocks are never shared across either.
The base is the engine's own and never changes; the grid stands for the processing contract, as in `sight`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class BlockKeys:
    """Keys of one sequence's full blocks, as it grows.

    Args:
        tenant: whose sequence it is.
        adapter: digest of what it wears; empty for the base.
        block_tokens: tokens in a block.
        pictures: (place of the first token, digest, grid) of each picture, in order.
    """

    def __init__(
        self, tenant: str, adapter: str, block_tokens: int, pictures: Sequence[tuple[int, str, tuple[int, ...]]]
    ) -> None:
        self._size = block_tokens
        self._pictures = list(pictures)
        self._keys: list[bytes] = []
        # Lengths in front: no tenant's name runs into an adapter's.
        self._last = hashlib.sha256(f"{len(tenant)}:{tenant}/{adapter}".encode()).digest()

    def upto(self, tokens: int, ids_T: NDArray[np.int64], positions_3_T: NDArray[np.int64]) -> list[bytes]:
        """The keys of all blocks that the first `tokens` tokens fill.

        Args:
            tokens: that are known.
            ids_T: at least these.
            positions_3_T: of them.
        """
        for number in range(len(self._keys), tokens // self._size):
            start, stop = number * self._size, (number + 1) * self._size
            digest = hashlib.sha256(self._last)
            digest.update(ids_T[start:stop].tobytes())
            digest.update(positions_3_T[:, start:stop].tobytes())
            while self._pictures and self._pictures[0][0] < stop:
                _, picture, grid = self._pictures.pop(0)
                digest.update(f"{picture}{grid}".encode())
            self._last = digest.digest()
            self._keys.append(self._last)
        return self._keys[: tokens // self._size]
