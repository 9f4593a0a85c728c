"""An exported model of graphs in the place of torch's: the same scheduler, sampling and caches stand around it.

What the engine calls hidden states are the graphs' logits here: the decoder graph holds the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer_inference.engine.runner import Item, Runner
from veneer_vlm.attention import PackedAttention
from veneer_vlm.config import ModelConfig
from veneer_vlm.graphs import GraphDecoder, GraphVision, open_session
from veneer_vlm.head import DistinctRows, Head
from veneer_vlm.linear import Adapters
from veneer_vlm.lora import Adapter
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.paged import PADDING_BLOCK, BlockCache
from veneer_vlm.vision import Grid, VisionPass, VisionTower, VisualFeatures


@dataclass
class _GraphPass(VisionPass):
    """Pictures on their way through the graph, which takes them in one slice."""

    grids: Sequence[Grid] = ()


class _GraphTower(VisionTower):
    def __init__(self, vision: GraphVision) -> None:
        nn.Module.__init__(self)
        self.config = vision.config
        self._vision = vision

    def start(self, patches_P_X: Tensor, grids: Sequence[Grid], lora: Adapters | None = None) -> VisionPass:
        """See VisionTower."""
        attention = PackedAttention([rows * columns for _, rows, columns in grids], causal=False)
        return _GraphPass(patches_P_X, (patches_P_X, patches_P_X), attention, None, grids=grids)

    def advance(self, vision_pass: VisionPass, multiplications: float) -> bool:
        """See VisionTower."""
        return True

    def finish(self, vision_pass: VisionPass) -> VisualFeatures:
        """See VisionTower."""
        assert isinstance(vision_pass, _GraphPass)  # noqa: S101  # `start` made it
        pieces, first = [], 0
        for grid in vision_pass.grids:
            stop = first + grid[1] * grid[2]
            pieces.append(self._vision.see(vision_pass.hidden_P_W[first:stop].contiguous(), grid))
            first = stop
        return VisualFeatures.joined(pieces)


class _GraphHead(Head):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    def distinct(self) -> DistinctRows | None:
        """See Head: the graph has done what can be done."""
        return None

    def project(self, input_T_I: Tensor) -> Tensor:
        """The logits that came as hidden states."""
        return input_T_I

    def cross_entropy(self, input_T_I: Tensor, targets_T: Tensor) -> Tensor:
        """See Head."""
        return F.cross_entropy(input_T_I, targets_T, reduction="none")


class GraphModel(VisionLanguageModel):
    """What the engine asks of a model beside its passes.

    Args:
        directory: of the export.
        threads: to compute with.

    Raises:
        RefusedError: the export cannot be opened.
    """

    def __init__(self, directory: Path, threads: int) -> None:
        nn.Module.__init__(self)
        self.config = ModelConfig.from_directory(directory)
        self.visual = _GraphTower(GraphVision(open_session(directory, "vision", threads), self.config.vision))
        self.lm_head = _GraphHead()
        self.decoder = GraphDecoder(open_session(directory, "decoder", threads), self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes in and comes out."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the graphs are."""
        return torch.device("cpu")


class GraphRunner(Runner):
    """Runs passes of the decoder graph: sequences with one new token together, others alone.

    Args:
        model: the graphs.
        blocks: of key-value memory.
        block_tokens: tokens in a block.
    """

    def __init__(self, model: GraphModel, blocks: int, block_tokens: int) -> None:
        self.cache = BlockCache(model.config.text, blocks, block_tokens, torch.float32, "cpu")
        self._decoder = model.decoder

    def run(self, items: Sequence[Item]) -> Tensor:
        """The logits of all wanted tokens, item by item, (N, V)."""
        found: dict[int, Tensor] = {}
        single = [number for number, item in enumerate(items) if len(item.ids_T) == 1]
        groups = ([single] if single else []) + [[n] for n, item in enumerate(items) if len(item.ids_T) > 1]
        for group in groups:
            logits_N_V = self._run([items[number] for number in group])
            counts = [len(items[number].wanted) for number in group]
            found |= dict(zip(group, torch.split(logits_N_V, counts), strict=True))
        return torch.cat([found[number] for number in range(len(items))])

    def forget(self, adapter: Adapter) -> None:
        """See Runner: graphs wear nothing."""

    def _run(self, items: Sequence[Item]) -> Tensor:
        """One pass over items of the same number of tokens."""
        if any(item.adapter is not None for item in items):
            raise ValueError("an exported model of graphs wears no adapter")
        size, tokens = self.cache.block_tokens, len(items[0].ids_T)
        held = max(1, *(-(-item.past // size) for item in items))
        tables = [[*item.blocks[: -(-item.past // size)]] for item in items]
        blocks = torch.tensor([[*table, *[PADDING_BLOCK] * (held - len(table))] for table in tables])
        seen = np.zeros((len(items), tokens, held * size + tokens), bool)
        seen[..., held * size :] = np.tril(np.ones((tokens, tokens), bool))
        for number, item in enumerate(items):
            seen[number, :, : item.past] = True
        wanted = [number * tokens + place for number, item in enumerate(items) for place in item.wanted]
        visual = [item.visual for item in items if item.visual is not None]
        logits_N_V, keys, values = self._decoder.run(
            np.stack([item.ids_T for item in items]),
            np.stack([item.positions_3_T for item in items], axis=1),
            seen,
            self._past(self.cache.key_L_B_C_G_K, blocks),
            self._past(self.cache.value_L_B_C_G_K, blocks),
            np.array(wanted or [0], np.int64),  # a piece of a prompt wants none: not every runtime takes an empty list
            VisualFeatures.joined(visual) if visual else None,
        )
        places = torch.tensor(
            [item.blocks[t // size] * size + t % size for item in items for t in range(item.past, item.past + tokens)]
        )
        for kept, new in ((self.cache.key_L_B_C_G_K, keys), (self.cache.value_L_B_C_G_K, values)):
            new_L_T_G_K = torch.from_numpy(new).transpose(2, 3).flatten(1, 2)
            kept.flatten(1, 2).index_copy_(1, places, new_L_T_G_K)
        return logits_N_V[: len(wanted)]

    @staticmethod
    def _past(kept_L_B_C_G_K: Tensor, blocks_n_b: Tensor) -> np.ndarray:
        """Keys or values of the past, (L, n, G, S, K)."""
        past = kept_L_B_C_G_K[:, blocks_n_b].flatten(2, 3).transpose(2, 3)
        return past.contiguous().numpy()
