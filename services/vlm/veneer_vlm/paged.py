"""Static memory of keys and values in blocks, and attention of many sequences over it in few calls.

Owns the tensors and the arithmetic of a pass that appends and attends. Which sequence holds which blocks, and how many
tokens it has there, is the business of an engine's scheduler.

Sequences of about the same lengths are padded to one another and attended in one call, so that a step over many of them
costs a handful of operations a layer. What is padded is zeros that nobody else wrote: a sequence whose numbers went
astray (an adapter can do that) never reaches another one's answer.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer_vlm.attention import attend
from veneer_vlm.config import TextConfig

PADDING_BLOCK = 0  # always zeros; no sequence may hold it
_ALONE_FROM = 64  # new tokens: from here padding costs more than a call of its own


class BlockCache:
    """Keys and values of every layer in blocks of tokens; allocated once.

    Args:
        config: the decoder's shape.
        blocks: how many blocks sequences may hold: numbers 1 to `blocks`.
        block_tokens: tokens a block can hold (C).
        dtype: that of the model.
        device: that of the model.

    Attributes:
        key_L_B_C_G_K: rotated keys; block 0 is `PADDING_BLOCK`.
        value_L_B_C_G_K: values.
        block_tokens: tokens a block can hold.
    """

    def __init__(
        self, config: TextConfig, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.num_hidden_layers, blocks + 1, block_tokens, config.num_key_value_heads, config.head_dim)
        self.key_L_B_C_G_K = torch.zeros(shape, dtype=dtype, device=device)
        self.value_L_B_C_G_K = torch.zeros(shape, dtype=dtype, device=device)
        self.block_tokens = block_tokens

    @property
    def size_bytes(self) -> int:
        """Memory of all blocks."""
        return 2 * self.key_L_B_C_G_K.nbytes


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence in a pass.

    Attributes:
        blocks: the sequence's blocks, in the order of its tokens; at least as many as past and new tokens fill.
        past: tokens that earlier passes wrote.
        tokens: new ones.
    """

    blocks: Sequence[int]
    past: int
    tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """n chunks attended in one call, padded to Q queries and b blocks."""

    query_nQ: Tensor  # which of the pass's tokens, row by row
    blocks_nb: Tensor
    shape: tuple[int, int]  # n, Q
    mask: Tensor | None  # (n, 1, Q x H/G, C) to add to the scores, or (Q, C) of a chunk alone; None where causal or all


class PagedAttention:
    """One pass over new tokens of several sequences, each of which sees its own past and then its own new tokens.

    The tokens of the pass lie as `chunks` lists them; a chunk may be a whole prompt, a piece of one or a single token.

    Args:
        cache: where to remember.
        chunks: each sequence once.
        heads: H, of the queries.

    Raises:
        ValueError: a chunk has no tokens, or more than its blocks hold, or names the padding block.
    """

    def __init__(self, cache: BlockCache, chunks: Sequence[Chunk], heads: int) -> None:
        size = cache.block_tokens
        for chunk in chunks:
            if not 0 < chunk.tokens <= len(chunk.blocks) * size - chunk.past or PADDING_BLOCK in chunk.blocks:
                raise ValueError(
                    f"{chunk.past} and {chunk.tokens} tokens do not fit blocks {list(chunk.blocks)} of {size}"
                )
        self._cache = cache
        self._groups_of_heads = cache.key_L_B_C_G_K.shape[3]
        self._heads = heads
        device = cache.key_L_B_C_G_K.device
        places: list[int] = []
        begun: list[int] = []
        for chunk in chunks:
            end = chunk.past + chunk.tokens
            places += [chunk.blocks[t // size] * size + t % size for t in range(chunk.past, end)]
            if end % size and end // size * size >= chunk.past:
                begun.append(chunk.blocks[end // size])  # its tail holds what its last owner wrote
        self._place_T = torch.tensor(places, device=device)
        if begun:
            begun_index = torch.tensor(begun, device=device)
            cache.key_L_B_C_G_K.index_fill_(1, begun_index, 0)
            cache.value_L_B_C_G_K.index_fill_(1, begun_index, 0)
        self._groups, order = self._grouped(chunks)
        rows = sum(len(group.query_nQ) for group in self._groups)
        in_order = rows == len(order) and order == list(range(rows))
        self._order_T = None if in_order else torch.tensor(order, device=device)

    def __call__(self, layer: int, query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor) -> Tensor:
        """See `veneer_vlm.attention.Attention`."""
        key_B_C_G_K, value_B_C_G_K = self._cache.key_L_B_C_G_K[layer], self._cache.value_L_B_C_G_K[layer]
        key_B_C_G_K.flatten(0, 1).index_copy_(0, self._place_T, key_T_G_K)
        value_B_C_G_K.flatten(0, 1).index_copy_(0, self._place_T, value_T_G_K)
        gathered = [self._attend(group, query_T_H_K, key_B_C_G_K, value_B_C_G_K) for group in self._groups]
        joined = gathered[0] if len(gathered) == 1 else torch.cat(gathered)
        return joined if self._order_T is None else joined.index_select(0, self._order_T)

    def _attend(self, group: _Group, query_T_H_K: Tensor, key_B_C_G_K: Tensor, value_B_C_G_K: Tensor) -> Tensor:
        """(n Q, H, K)."""
        (n, queries), heads, groups = group.shape, self._heads, self._groups_of_heads
        query = query_T_H_K.index_select(0, group.query_nQ)
        key = key_B_C_G_K.index_select(0, group.blocks_nb).view(n, -1, *key_B_C_G_K.shape[2:])
        value = value_B_C_G_K.index_select(0, group.blocks_nb).view(n, -1, *key_B_C_G_K.shape[2:])
        if group.mask is None or group.mask.ndim == 2:
            if group.mask is None:  # from its first token on: the last block's tail is not its own
                key, value = key[:, :queries], value[:, :queries]
            return attend(query, key[0], value[0], causal=group.mask is None, mask_T_C=group.mask)
        # Heads that share keys stand as rows, so that the keys are read once a group.
        query = query.view(n, queries, groups, heads // groups, -1).transpose(1, 2).flatten(2, 3)
        gathered = F.scaled_dot_product_attention(
            query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=group.mask
        )
        return gathered.view(n, groups, queries, heads // groups, -1).transpose(1, 2).reshape(n * queries, heads, -1)

    def _grouped(self, chunks: Sequence[Chunk]) -> tuple[list[_Group], list[int]]:
        """The groups, and where each of the pass's tokens stands in their joined results."""
        size = self._cache.block_tokens
        starts = list(itertools.accumulate((chunk.tokens for chunk in chunks), initial=0))
        members: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        held = [-(-(chunk.past + chunk.tokens) // size) for chunk in chunks]
        for number, chunk in enumerate(chunks):
            if chunk.tokens < _ALONE_FROM:  # within a factor of two of one another
                members[chunk.tokens.bit_length(), held[number].bit_length(), -1].append(number)
            else:
                members[0, 0, number].append(number)
        order = [0] * starts[-1]
        groups = []
        done = 0
        for (*_, alone), numbers in members.items():
            queries = max(chunks[number].tokens for number in numbers)
            blocks = max(held[number] for number in numbers)
            rows: list[int] = []
            table: list[int] = []
            for number in numbers:
                chunk, start = chunks[number], starts[number]
                order[start : start + chunk.tokens] = range(done, done + chunk.tokens)
                done += queries
                rows += [*range(start, start + chunk.tokens), *[start] * (queries - chunk.tokens)]
                table += [*chunk.blocks[: held[number]], *[PADDING_BLOCK] * (blocks - held[number])]
            pasts = [chunks[number].past for number in numbers]
            groups.append(self._group(rows, table, pasts, queries, blocks, alone=alone >= 0))
        return groups, order

    def _group(
        self, rows: list[int], table: list[int], pasts: list[int], queries: int, blocks: int, *, alone: bool
    ) -> _Group:
        cache = self._cache
        device, dtype = cache.key_L_B_C_G_K.device, cache.key_L_B_C_G_K.dtype
        mask = None
        if not alone or pasts[0]:
            last_n_Q = torch.tensor(pasts, device=device)[:, None] + torch.arange(queries, device=device)
            seen_n_Q_C = torch.arange(blocks * cache.block_tokens, device=device) <= last_n_Q[..., None]
            if alone:
                mask = seen_n_Q_C[0]
            else:
                mask = torch.zeros(seen_n_Q_C.shape, dtype=dtype, device=device).masked_fill_(~seen_n_Q_C, -torch.inf)
                mask = mask.repeat_interleave(self._heads // self._groups_of_heads, 1)[:, None]
        return _Group(
            torch.tensor(rows, device=device), torch.tensor(table, device=device), (len(pasts), queries), mask
        )
