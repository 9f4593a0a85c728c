"""What an engine is started with. Without torch: the service's process makes them, the engine's reads them."""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec


class Choices(TypedDict, total=False):
    """What has a default in `EngineOptions`, which says what it is."""

    dtype: Literal["float32", "bfloat16"]
    kv_tokens: int
    slots: int
    max_rank: int
    step_tokens: int
    running: int
    waiting: int
    waiting_bytes: int
    adapter_bytes: int
    feature_bytes: int


class EngineOptions(msgspec.Struct, kw_only=True, frozen=True):
    """Bounds and choices of an engine.

    Attributes:
        model: directory of the base.
        threads: that torch computes with.
        dtype: of weights, keys and values.
        kv_tokens: of key-value memory over all requests.
        slots: adapters that running requests wear at once.
        max_rank: greatest rank of an adapter.
        step_tokens: tokens of a step at most; a longer prompt goes in pieces.
        running: requests that run at once.
        waiting: requests that wait at once; of one tenant at most half of them.
        waiting_bytes: of the waiting requests' prompts.
        adapter_bytes: of adapters in memory.
        feature_bytes: of kept features of pictures.
    """

    model: str
    threads: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    kv_tokens: int = 16384
    slots: int = 16
    max_rank: int = 64
    step_tokens: int = 512
    running: int = 64
    waiting: int = 256
    waiting_bytes: int = 1 << 30
    adapter_bytes: int = 1 << 30
    feature_bytes: int = 1 << 28
