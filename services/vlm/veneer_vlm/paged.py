"""Static memory of keys and values in blocks, and attention of many sequences over it in few calls.

Owns the tensors and the arithmetic of a pass that appends and attends. Which sequence holds which blocks, and how many
tokens it has there, is the business of an engine's scheduler.

Short sequences of about the same lengths are padded to one another and attended in one call, so that a step over many
of them costs a handful of operations a layer. What is padded is zeros that nobody else wrote: a sequence whose numbers
went astray (an adapter can do that) never reaches another one's answer. Where reading is what takes the time, on a CPU
and with much to read, a sequence is attended alone, and its keys and values are read where they lie. All that is for
torch: where the compiled library attends (`native`), few tokens of any sequences are one call, and nothing is copied.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer_vlm import native
from veneer_vlm.attention import attend, attend_to_places
from veneer_vlm.config import TextConfig

PADDING_BLOCK = 0  # always zeros; no sequence may hold it
_ALONE_FROM = 64  # new tokens: from here padding costs more than a call of its own
_IN_PLACE_FROM = 1 << 20  # bytes of a sequence's keys in a layer: from here gathering them costs a CPU more than a call
_PLACES = 4  # more of them are gathered first


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
    mask_n_1_QR_C: Tensor  # to add to the scores; R query heads share a key

    def attend(self, query_T_H_K: Tensor, key_B_C_G_K: Tensor, value_B_C_G_K: Tensor) -> Tensor:
        """(n Q, H, K)."""
        (n, queries), shape = self.shape, key_B_C_G_K.shape[2:]
        query_n_Q_H_K = query_T_H_K.index_select(0, self.query_nQ).view(n, queries, *query_T_H_K.shape[1:])
        key_n_C_G_K = key_B_C_G_K.index_select(0, self.blocks_nb).view(n, -1, *shape)
        value_n_C_G_K = value_B_C_G_K.index_select(0, self.blocks_nb).view(n, -1, *shape)
        return _attend_few(query_n_Q_H_K, key_n_C_G_K, value_n_C_G_K, self.mask_n_1_QR_C)


@dataclasses.dataclass(frozen=True, slots=True)
class _Alone:
    """A chunk attended in a call of its own."""

    queries: slice  # of the pass's tokens
    places: tuple[slice, ...]  # of the cache's tokens, in the sequence's order
    mask: Tensor | None  # (1, 1, QR, C) to add to the scores of few, (Q, C) of many; None where causal or all

    def attend(self, query_T_H_K: Tensor, key_B_C_G_K: Tensor, value_B_C_G_K: Tensor) -> Tensor:
        """(Q, H, K)."""
        query = query_T_H_K[self.queries]
        key_BC_G_K, value_BC_G_K = key_B_C_G_K.flatten(0, 1), value_B_C_G_K.flatten(0, 1)
        keys, values = ([memory[place] for place in self.places] for memory in (key_BC_G_K, value_BC_G_K))
        if len(query) == 1 and len(keys) <= _PLACES:
            return attend_to_places(query, keys, values)
        key, value = (each[0] if len(each) == 1 else torch.cat(each) for each in (keys, values))
        if self.mask is not None and self.mask.ndim > 2:
            return _attend_few(query[None], key[None], value[None], self.mask)
        return attend(query, key, value, causal=self.mask is None, mask_T_C=self.mask)


_Call = native.FewTokens | _Alone | _Group


def _attend_few(query_n_Q_H_K: Tensor, key_n_C_G_K: Tensor, value_n_C_G_K: Tensor, mask_n_1_QR_C: Tensor) -> Tensor:
    """Attention of few queries of each of n sequences, (n Q, H, K)."""
    (n, queries, heads, width), groups = query_n_Q_H_K.shape, key_n_C_G_K.shape[2]
    # Heads that share keys stand as rows, so that the keys are read once a group.
    rows_n_G_QR_K = query_n_Q_H_K.reshape(n, queries, groups, -1, width).transpose(1, 2).flatten(2, 3)
    gathered = F.scaled_dot_product_attention(
        rows_n_G_QR_K, key_n_C_G_K.transpose(1, 2), value_n_C_G_K.transpose(1, 2), attn_mask=mask_n_1_QR_C
    )
    return gathered.view(n, groups, queries, -1, width).transpose(1, 2).reshape(n * queries, heads, width)


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
        self._few_tokens = native.most_tokens(cache.key_L_B_C_G_K, heads)
        self._heads_of_key = heads // cache.key_L_B_C_G_K.shape[3]
        self._token_bytes = cache.key_L_B_C_G_K[0, 0, 0].nbytes
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
        self._calls, self._order_T = self._planned(chunks)

    def __call__(self, layer: int, query_T_H_K: Tensor, key_T_G_K: Tensor, value_T_G_K: Tensor) -> Tensor:
        """See `veneer_vlm.attention.Attention`."""
        key_B_C_G_K, value_B_C_G_K = self._cache.key_L_B_C_G_K[layer], self._cache.value_L_B_C_G_K[layer]
        key_B_C_G_K.flatten(0, 1).index_copy_(0, self._place_T, key_T_G_K)
        value_B_C_G_K.flatten(0, 1).index_copy_(0, self._place_T, value_T_G_K)
        gathered = [call.attend(query_T_H_K, key_B_C_G_K, value_B_C_G_K) for call in self._calls]
        joined = gathered[0] if len(gathered) == 1 else torch.cat(gathered)
        return joined if self._order_T is None else joined.index_select(0, self._order_T)

    def _planned(self, chunks: Sequence[Chunk]) -> tuple[list[_Call], Tensor | None]:
        """The calls of a layer, and where each token of the pass stands in their joined results; None for in order."""
        starts = list(itertools.accumulate((chunk.tokens for chunk in chunks), initial=0))
        few: list[int] = []
        alone: list[int] = []
        members: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, chunk in enumerate(chunks):
            if chunk.tokens <= self._few_tokens:
                few.append(number)
            elif self._stands_alone(chunk):
                alone.append(number)
            else:  # within a factor of two of one another
                members[chunk.tokens.bit_length(), self._blocks_held(chunk).bit_length()].append(number)
        planned: list[tuple[_Call, list[int], int]] = []  # with their chunks, and how many rows each has at least
        if few:
            planned.append((self._few([chunks[number] for number in few], [starts[number] for number in few]), few, 0))
        planned += [(self._alone(chunks[number], starts[number]), [number], 0) for number in alone]
        for numbers in members.values():
            group = self._group([chunks[number] for number in numbers], [starts[number] for number in numbers])
            planned.append((group, numbers, group.shape[1]))
        order = [0] * starts[-1]
        done = 0
        for _, numbers, least in planned:
            for number in numbers:
                start, tokens = starts[number], chunks[number].tokens
                order[start : start + tokens] = range(done, done + tokens)
                done += max(tokens, least)
        calls = [call for call, *_ in planned]
        in_order = order == list(range(done))
        return calls, None if in_order else torch.tensor(order, device=self._cache.key_L_B_C_G_K.device)

    def _stands_alone(self, chunk: Chunk) -> bool:
        read = (chunk.past + chunk.tokens) * self._token_bytes
        on_cpu = self._cache.key_L_B_C_G_K.device.type == "cpu"
        return chunk.tokens >= _ALONE_FROM or (on_cpu and read >= _IN_PLACE_FROM)

    def _blocks_held(self, chunk: Chunk) -> int:
        return -(-(chunk.past + chunk.tokens) // self._cache.block_tokens)

    def _few(self, chunks: Sequence[Chunk], starts: Sequence[int]) -> native.FewTokens:
        queries = (slice(start, start + chunk.tokens) for chunk, start in zip(chunks, starts, strict=True))
        *_, groups, width = self._cache.key_L_B_C_G_K.shape
        shape = (groups * self._heads_of_key, groups, width)
        return native.FewTokens(
            [chunk.blocks for chunk in chunks], [chunk.past for chunk in chunks], list(queries), shape
        )

    def _alone(self, chunk: Chunk, start: int) -> _Alone:
        size, end = self._cache.block_tokens, chunk.past + chunk.tokens
        held = chunk.blocks[: self._blocks_held(chunk)]
        places: list[slice] = []
        for number, block in enumerate(held):
            first, tokens = block * size, min(size, end - number * size)
            if places and places[-1].stop == first:
                places[-1] = slice(places[-1].start, first + tokens)
            else:
                places.append(slice(first, first + tokens))
        mask = None
        if 1 < chunk.tokens < _ALONE_FROM:
            mask = self._mask([chunk.past], chunk.tokens, end)
        elif chunk.tokens > 1 and chunk.past:
            mask = self._seen([chunk.past], chunk.tokens, end)[0]
        return _Alone(slice(start, start + chunk.tokens), tuple(places), mask)

    def _group(self, chunks: Sequence[Chunk], starts: Sequence[int]) -> _Group:
        device = self._cache.key_L_B_C_G_K.device
        queries = max(chunk.tokens for chunk in chunks)
        blocks = max(map(self._blocks_held, chunks))
        rows: list[int] = []
        table: list[int] = []
        for chunk, start in zip(chunks, starts, strict=True):
            held = self._blocks_held(chunk)
            rows += [*range(start, start + chunk.tokens), *[start] * (queries - chunk.tokens)]
            table += [*chunk.blocks[:held], *[PADDING_BLOCK] * (blocks - held)]
        return _Group(
            torch.tensor(rows, device=device),
            torch.tensor(table, device=device),
            (len(chunks), queries),
            self._mask([chunk.past for chunk in chunks], queries, blocks * self._cache.block_tokens),
        )

    def _seen(self, pasts: Sequence[int], queries: int, tokens: int) -> Tensor:
        """Which of so many tokens each query of each sequence sees, (n, Q, C)."""
        device = self._cache.key_L_B_C_G_K.device
        last_n_Q = torch.tensor(pasts, device=device)[:, None] + torch.arange(queries, device=device)
        return torch.arange(tokens, device=device) <= last_n_Q[..., None]

    def _mask(self, pasts: Sequence[int], queries: int, tokens: int) -> Tensor:
        """To add to the scores of rows, (n, 1, Q R, C)."""
        seen_n_Q_C = self._seen(pasts, queries, tokens)
        mask_n_Q_C = seen_n_Q_C.new_zeros(seen_n_Q_C.shape, dtype=self._cache.key_L_B_C_G_K.dtype)
        return mask_n_Q_C.masked_fill_(~seen_n_Q_C, -torch.inf).repeat_interleave(self._heads_of_key, 1)[:, None]
