"""One pass of the decoder over pieces of several sequences.

Owns the key-value memory, and how a batch of pieces becomes tensors. Which pieces is the scheduler's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer_vlm import native
from veneer_vlm.linear import Adapters
from veneer_vlm.lora import Adapter, AdapterBatch, Segment
from veneer_vlm.lora_pack import AdapterPack, PackedAdapterBatch
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.paged import BlockCache, Chunk, PagedAttention
from veneer_vlm.vision import VisualFeatures

_PACKED_UP_TO = 256  # tokens of a pass: beyond, what is padded costs more than few calls save
_PACK_SLACK = 4  # a pack is kept while it has at most so many times the rank that a pass needs
_SKEWED = 2  # adapters whose greatest rank times their number is more than so many times their ranks are not packed


@dataclass(frozen=True, slots=True)
class Item:
    """A piece with its tensors.

    Attributes:
        ids_T: its tokens.
        positions_3_T: theirs.
        blocks: of the sequence.
        past: tokens of the sequence before the piece.
        wanted: which of the piece's tokens need their hidden state.
        visual: features of the image tokens among them; None where there are none.
        adapter: what they wear.
    """

    ids_T: NDArray[np.int64]
    positions_3_T: NDArray[np.int64]
    blocks: Sequence[int]
    past: int
    wanted: Sequence[int]
    visual: VisualFeatures | None
    adapter: Adapter | None


class Runner:
    """Runs passes.

    Args:
        model: the base.
        blocks: of key-value memory.
        block_tokens: tokens in a block.
    """

    def __init__(self, model: VisionLanguageModel, blocks: int, block_tokens: int) -> None:
        text = model.config.text
        self.cache = BlockCache(text, blocks, block_tokens, model.dtype, model.device)
        self._model = model
        self._heads = text.num_attention_heads
        self._pack: AdapterPack | None = None

    def run(self, items: Sequence[Item]) -> Tensor:
        """The last hidden states of all wanted tokens, item by item, (N, D).

        Args:
            items: each of another sequence; those that wear the same adapter stand side by side.
        """
        device = self._model.device
        chunks = [Chunk(item.blocks, item.past, len(item.ids_T)) for item in items]
        attention = PagedAttention(self.cache, chunks, self._heads)
        seen = [item.visual for item in items if item.visual is not None]
        hidden_T_D: Tensor = self._model(
            torch.from_numpy(np.concatenate([item.ids_T for item in items])).to(device),
            torch.from_numpy(np.concatenate([item.positions_3_T for item in items], axis=1)).to(device),
            attention,
            VisualFeatures.joined(seen) if seen else None,
            self._lora([(item.adapter, len(item.ids_T)) for item in items]),
        )
        wanted: list[int] = []
        start = 0
        for item in items:
            wanted += [start + token for token in item.wanted]
            start += len(item.ids_T)
        return hidden_T_D if len(wanted) == start else hidden_T_D[torch.tensor(wanted, dtype=torch.long, device=device)]

    def forget(self, adapter: Adapter) -> None:
        """Lets go of an adapter that left its slot."""
        if self._pack is not None:
            self._pack.release(adapter)

    def _lora(self, worn: Sequence[tuple[Adapter | None, int]]) -> Adapters | None:
        segments: list[Segment] = []
        start = 0
        for adapter, tokens in worn:
            stop = start + tokens
            if adapter is not None:
                if segments and segments[-1].adapter is adapter and segments[-1].stop == start:
                    segments[-1] = Segment(adapter, segments[-1].start, stop)
                else:
                    segments.append(Segment(adapter, start, stop))
            start = stop
        if not segments:
            return None
        needed = list({id(segment.adapter): segment.adapter for segment in segments}.values())
        alone = len(needed) == 1 and not native.AVAILABLE  # torch is quicker with it as it lies
        if start > _PACKED_UP_TO or alone or _padded(needed) > _SKEWED * _ranks(needed):
            return AdapterBatch(segments)
        pack = self._packed(needed)
        place = dict(zip(map(id, needed), pack.place(needed), strict=True))
        places = [-1 if adapter is None else place[id(adapter)] for adapter, _ in worn]
        place_T = torch.tensor(places).repeat_interleave(torch.tensor([tokens for _, tokens in worn]))
        return PackedAdapterBatch(pack, place_T)

    def _packed(self, needed: Sequence[Adapter]) -> AdapterPack:
        """The pack of the last pass, where it has room for what is needed and not much more."""
        pack, rank = self._pack, max(adapter.config.r for adapter in needed)
        if (
            pack is None
            or pack.places < len(needed)
            or pack.rank < rank
            or pack.places * pack.rank > _PACK_SLACK * _ranks(needed)
        ):
            pack = self._pack = AdapterPack(1 << (len(needed) - 1).bit_length(), rank, self._model.device)
        return pack


def _ranks(adapters: Sequence[Adapter]) -> int:
    return sum(adapter.config.r for adapter in adapters)


def _padded(adapters: Sequence[Adapter]) -> int:
    return len(adapters) * max(adapter.config.r for adapter in adapters)
