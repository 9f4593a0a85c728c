"""What an engine is started with. Without torch: the service's process makes them, the engine's reads them."""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec

Precision = Literal["float32", "bfloat16", "int8", "auto"]


class Choices(TypedDict, total=False):
    """What has a default in `EngineOptions`, which says what it is."""

    dtype: Precision
    as_stored: bool
    kv_tokens: int
    slots: int
    max_rank: int
    step_tokens: int
    running: int
    waiting: int
    waiting_bytes: int
    adapter_bytes: int
    feature_bytes: int
    prefix_cache: bool
    speculation: bool


class EngineOptions(msgspec.Struct, kw_only=True, frozen=True):
    """Bounds and choices of an engine.

    Attributes:
        model: directory of the base.
        threads: that torch computes with.
        dtype: of the base's numbers. "int8": its linears in eight bits, the rest in the machine's fastest floats;
            "auto": that where a held-out check allows it, else those floats.
        as_stored: whether large weights stay in the bits that they are stored in; see `veneer_vlm.weights.load`.
        kv_tokens: of key-value memory over all requests.
        slots: adapters that running requests wear at once.
        max_rank: greatest rank of an adapter.
        step_tokens: tokens of a step at most; a longer prompt goes in pieces.
        running: requests that run at once.
        waiting: requests that wait at once; of one tenant at most half of them.
        waiting_bytes: of the waiting requests' prompts.
        adapter_bytes: of adapters in memory.
        feature_bytes: of kept features of pictures.
        prefix_cache: whether requests share what was computed of equal beginnings.
        speculation: whether answers guess ahead by what was said before.
    """

    model: str
    threads: int
    dtype: Precision = "float32"
    as_stored: bool = False
    kv_tokens: int = 16384
    slots: int = 16
    max_rank: int = 64
    step_tokens: int = 512
    running: int = 64
    waiting: int = 256
    waiting_bytes: int = 1 << 30
    adapter_bytes: int = 1 << 30
    feature_bytes: int = 1 << 28
    prefix_cache: bool = True
    speculation: bool = True
