"""The adapters that an engine holds in host memory, by digest, and who uses them. Without torch.

What no request uses goes when another needs its room, the one that was used longest ago first. What a request uses
stays, whatever happens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from veneer_inference.ports import EngineError

A = TypeVar("A")


@dataclass(slots=True)
class _Held(Generic[A]):
    adapter: A
    size_bytes: int
    references: int = 0
    retired: bool = False  # asked to go: no new request may use it


class AdapterMemory(Generic[A]):
    """Adapters with reference counts, within a bound of bytes.

    Args:
        capacity_bytes: of all adapters together.
        dropped: called with the digest of an adapter that is about to go.
    """

    def __init__(self, capacity_bytes: int, dropped: Callable[[str], None]) -> None:
        self.capacity_bytes = capacity_bytes
        self._dropped = dropped
        self._held: OrderedDict[str, _Held[A]] = OrderedDict()  # the first was used longest ago
        self.evictions = 0

    @property
    def size_bytes(self) -> int:
        """Of all adapters that are held."""
        return sum(held.size_bytes for held in self._held.values())

    def __getitem__(self, digest: str) -> A:
        return self._held[digest].adapter

    def held(self) -> list[tuple[str, int, int]]:
        """(digest, references, bytes) of every adapter."""
        return [(digest, held.references, held.size_bytes) for digest, held in self._held.items()]

    def revive(self, digest: str) -> int | None:
        """Bytes of an adapter that is held, which new requests may use again; None where it is not held."""
        held = self._held.get(digest)
        if held is None:
            return None
        held.retired = False
        self._held.move_to_end(digest)
        return held.size_bytes

    def add(self, digest: str, adapter: A, size_bytes: int, retry_s: float) -> None:
        """Holds an adapter, and drops unused ones for it.

        Raises:
            EngineError: `ADAPTER_INVALID`: it alone is over the bound; `QUEUE_FULL`: those in use leave no room for it.
        """
        if size_bytes > self.capacity_bytes:
            problem = f"its tensors have {size_bytes} bytes, adapters may have {self.capacity_bytes} together"
            raise EngineError("ADAPTER_INVALID", [problem])
        in_use = sum(held.size_bytes for held in self._held.values() if held.references)
        if in_use + size_bytes > self.capacity_bytes:
            problem = f"adapters in use have {in_use} of {self.capacity_bytes} bytes, {size_bytes} more are needed"
            raise EngineError("QUEUE_FULL", [problem], retry_s)
        for other in [other for other, held in self._held.items() if not held.references]:
            if self.size_bytes + size_bytes <= self.capacity_bytes:
                break
            self._drop(other)
            self.evictions += 1
        self._held[digest] = _Held(adapter, size_bytes)

    def acquire(self, digest: str) -> None:
        """A request uses it from now on.

        Raises:
            EngineError: `ADAPTER_NOT_LOADED`.
        """
        held = self._held.get(digest)
        if held is None or held.retired:
            raise EngineError("ADAPTER_NOT_LOADED", [f"adapter {digest} is not loaded"])
        held.references += 1
        self._held.move_to_end(digest)

    def release(self, digest: str) -> None:
        """A request that used it has ended."""
        held = self._held[digest]
        held.references -= 1
        if held.retired and not held.references:
            self._drop(digest)

    def retire(self, digest: str) -> None:
        """Lets no new request use it, and drops it when none does any more; nothing where it is not held."""
        held = self._held.get(digest)
        if held is not None:
            held.retired = True
            if not held.references:
                self._drop(digest)

    def _drop(self, digest: str) -> None:
        self._dropped(digest)
        del self._held[digest]
