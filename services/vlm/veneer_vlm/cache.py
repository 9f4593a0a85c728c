"""Static memory of keys and values, and attention over it.

Owns the tensors, how many tokens each slot holds, and the arithmetic of a pass that appends and attends.
Which sequence gets which slot, what is reused and when memory is full for a newcomer is the business of an
engine's scheduler.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer_vlm.attention import attend
from veneer_vlm.config import TextConfig


class CacheFullError(RuntimeError):
    """More tokens than a slot can hold."""


class KeyValueCache:
    """Keys and values of every layer for a fixed number of sequences; allocated once.

    Args:
        config: the decoder's shape.
        slots: sequences held at once.
        capacity: tokens a slot can hold.
        dtype: that of the model.
        device: that of the model.

    Attributes:
        lengths: tokens in each slot. Its owner may lower one, to forget the tokens beyond it.
    """

    def __init__(
        self, config: TextConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (
            config.num_hidden_layers,
            slots,
            capacity,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.key_L_S_C_G_K = torch.zeros(shape, dtype=dtype, device=device)
        self.value_L_S_C_G_K = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.lengths = [0] * slots

    @property
    def size_bytes(self) -> int:
        """Memory of all slots."""
        return 2 * self.key_L_S_C_G_K.nbytes


class CachedAttention:
    """One pass over new tokens of several sequences, each of which sees its slot's past and then its own.

    The tokens of the pass lie as `chunks` lists them. A chunk may be a whole prompt, a piece of one or a
    single decoded token, mixed at will. After the pass the caller says `commit`; a pass that failed and was
    not committed leaves no trace.

    Args:
        cache: where to remember.
        chunks: (slot, number of new tokens), each slot once.

    Raises:
        CacheFullError: a slot cannot hold its new tokens.
        ValueError: a slot is named twice.
    """

    def __init__(self, cache: KeyValueCache, chunks: Sequence[tuple[int, int]]) -> None:
        if len({slot for slot, _ in chunks}) != len(chunks):
            raise ValueError(f"a slot may have one chunk a pass, got slots {[slot for slot, _ in chunks]}")
        for slot, tokens in chunks:
            held = cache.lengths[slot]
            if held + tokens > cache.capacity:
                raise CacheFullError(f"slot {slot} holds {held} tokens of {cache.capacity}, {tokens} more do not fit")
        self.cache = cache
        self.chunks = chunks
        device = cache.key_L_S_C_G_K.device
        self.masks = [_lower_right(cache.lengths[slot], tokens, device) for slot, tokens in chunks]

    def __call__(self, layer: int, query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor) -> Tensor:
        """See `veneer_vlm.attention.Attention`."""
        key_S_C_G_K, value_S_C_G_K = self.cache.key_L_S_C_G_K[layer], self.cache.value_L_S_C_G_K[layer]
        gathered = []
        start = 0
        for (slot, tokens), mask in zip(self.chunks, self.masks, strict=True):
            here = slice(start, start + tokens)
            past = self.cache.lengths[slot]
            key_S_C_G_K[slot, past : past + tokens] = key_T_G_K[here]
            value_S_C_G_K[slot, past : past + tokens] = value_T_G_K[here]
            gathered.append(
                attend(
                    query_T_H_K[here],
                    key_S_C_G_K[slot, : past + tokens],
                    value_S_C_G_K[slot, : past + tokens],
                    causal=past == 0,
                    mask_T_C=mask,
                )
            )
            start += tokens
        return torch.cat(gathered)

    def commit(self) -> None:
        """Keep what this pass appended."""
        for slot, tokens in self.chunks:
            self.cache.lengths[slot] += tokens


def _lower_right(past: int, tokens: int, device: torch.device) -> Tensor | None:
    """Token t sees the past and its chunk up to itself; None where the kernel's causal rule says so."""
    if past == 0 or tokens == 1:
        return None
    return torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
