"""The vision tower over the packed patches of several pictures.

Owns patch embedding, blocks, mergers, and a pass that can be cut into slices, so that an engine may run other work in
between: a large picture's layer alone takes a second on two cores, so layers are cut too, into rows of patches. Patches
come from `veneer_processing`, block by block: the merge² patches that become one visual token lie next to each other.
"""

import dataclasses
import math
from collections.abc import Generator, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer_vlm.attention import PackedAttention
from veneer_vlm.config import VisionConfig
from veneer_vlm.linear import Adapters, Linear, embedding
from veneer_vlm.rotary import Rotation, rotate, vision_rotation

Grid = tuple[int, int, int]
"""(frames, rows, columns) of a picture in patches; a picture has one frame."""


@dataclasses.dataclass(frozen=True)
class VisualFeatures:
    """What the tower makes of pictures, for the decoder.

    Attributes:
        tokens_M_D: in place of the embeddings of the visual tokens.
        deepstack_M_D: added after the decoder's first layers, one tensor a layer.
    """

    tokens_M_D: Tensor
    deepstack_M_D: tuple[Tensor, ...]

    def __getitem__(self, rows: slice) -> "VisualFeatures":
        """The features of some visual tokens: a picture's own, or those within a chunk of a prompt."""
        return VisualFeatures(self.tokens_M_D[rows], tuple(level[rows] for level in self.deepstack_M_D))

    def to(self, device: torch.device | str) -> "VisualFeatures":
        """The same on a device; itself where it is there already."""
        if self.tokens_M_D.device == torch.device(device):
            return self
        return VisualFeatures(self.tokens_M_D.to(device), tuple(level.to(device) for level in self.deepstack_M_D))

    @staticmethod
    def joined(pieces: Sequence["VisualFeatures"]) -> "VisualFeatures":
        """The features of several pictures, one after another."""
        levels = zip(*(piece.deepstack_M_D for piece in pieces), strict=True)
        return VisualFeatures(
            torch.cat([piece.tokens_M_D for piece in pieces]), tuple(torch.cat(level) for level in levels)
        )


@dataclasses.dataclass
class VisionPass:
    """A pass through the tower that has come as far as `layer`.

    Attributes:
        hidden_P_W: the stream.
        rotation: of every patch.
        attention: within each picture.
        lora: what the patches wear.
        layer: the next block to run.
        deepstack_M_D: features merged so far.
        tokens_M_D: the last of all; None before.
        slices: what is left to run, each with its multiplications; None before the first.
    """

    hidden_P_W: Tensor
    rotation: Rotation
    attention: PackedAttention
    lora: Adapters | None
    layer: int = 0
    deepstack_M_D: list[Tensor] = dataclasses.field(default_factory=list)
    tokens_M_D: Tensor | None = None
    slices: Iterator[float] | None = None


Pieces = Generator[float, None, Tensor]
"""Rows of a result, piece by piece: yields the multiplications of each, and returns all rows."""


class PatchEmbed(nn.Module):
    """The checkpoint's convolution; its stride is its kernel, so it is a linear over a patch's values."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = Linear(config.patch_values, config.hidden_size, bias=True)


class VisionAttention(nn.Module):
    """Attention of all patches of a picture to one another."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=True)

    def heads(self, hidden_P_W: Tensor, rotation: Rotation, lora: Adapters | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, (P, H, K) each."""
        qkv_P_3_H_K = self.qkv(hidden_P_W, lora).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv_P_3_H_K.unbind(1)
        return rotate(query, rotation), rotate(key, rotation), value

    def output(self, gathered_P_H_K: Tensor, lora: Adapters | None) -> Tensor:
        """(P, W)."""
        output_P_W: Tensor = self.proj(gathered_P_H_K.flatten(1), lora)
        return output_P_W


class VisionMLP(nn.Module):
    """Two linears around a tanh-approximated GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, hidden_P_W: Tensor, lora: Adapters | None) -> Tensor:
        """(P, W)."""
        inner = F.gelu(self.linear_fc1(hidden_P_W, lora), approximate="tanh")
        output_P_W: Tensor = self.linear_fc2(inner, lora)
        return output_P_W


class VisionBlock(nn.Module):
    """Attention, then MLP, each on a normed input and added to the stream."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = VisionMLP(config)

    def pieces(
        self, hidden_P_W: Tensor, rotation: Rotation, attention: PackedAttention, lora: Adapters | None, rows: int
    ) -> Pieces:
        """The stream after the block, so many rows at a time: queries, keys and values of all, then the rest."""
        width, inner = hidden_P_W.shape[-1], self.mlp.linear_fc1.weight_outputs
        heads = []
        for start, stop in _spans(len(hidden_P_W), rows):
            turned = (rotation[0][start:stop], rotation[1][start:stop])
            heads.append(self.attn.heads(self.norm1(hidden_P_W[start:stop]), turned, _rows(lora, start, stop)))
            yield (stop - start) * 3.0 * width**2
        query, key, value = (_whole(parts) for parts in zip(*heads, strict=True))
        done = []
        for start, stop in _spans(len(hidden_P_W), rows):
            worn = _rows(lora, start, stop)
            gathered_P_H_K = attention.rows(start, stop, query, key, value)
            here_P_W = hidden_P_W[start:stop] + self.attn.output(gathered_P_H_K, worn)
            done.append(here_P_W + self.mlp(self.norm2(here_P_W), worn))
            yield (stop - start) * (width**2 + 2.0 * width * inner) + attention.seen(start, stop) * 2.0 * width
        return _whole(done)


class PatchMerger(nn.Module):
    """merge² neighbouring patches become one visual token of the decoder's width.

    Args:
        config: the tower's shape.
        norm_merged: norm the merged patch (deepstack) rather than each patch before it is merged (the tower's
            end).
    """

    def __init__(self, config: VisionConfig, *, norm_merged: bool) -> None:
        super().__init__()
        self.merge = config.spatial_merge_size**2
        self.norm_merged = norm_merged
        self.norm = nn.LayerNorm(config.merged_size if norm_merged else config.hidden_size, eps=1e-6)
        self.linear_fc1 = Linear(config.merged_size, config.merged_size, bias=True)
        self.linear_fc2 = Linear(config.merged_size, config.out_hidden_size, bias=True)

    def forward(self, hidden_P_W: Tensor, lora: Adapters | None) -> Tensor:
        """(M, D)."""
        lora = None if lora is None else lora.merged(self.merge)
        if self.norm_merged:
            merged = self.norm(_side_by_side(hidden_P_W, self.merge))
        else:
            merged = _side_by_side(self.norm(hidden_P_W), self.merge)
        tokens_M_D: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(merged, lora)), lora)
        return tokens_M_D

    def pieces(self, hidden_P_W: Tensor, lora: Adapters | None, rows: int) -> Pieces:
        """(M, D), so many patches at a time, a multiple of merge²."""
        size = self.linear_fc1.weight_outputs
        done = []
        for start, stop in _spans(len(hidden_P_W), rows):
            done.append(self(hidden_P_W[start:stop], _rows(lora, start, stop)))
            yield (stop - start) / self.merge * size * (size + self.linear_fc2.weight_outputs)
        return _whole(done)


def _side_by_side(hidden_P_W: Tensor, merge: int) -> Tensor:
    return hidden_P_W.view(-1, merge * hidden_P_W.shape[-1])


class VisionTower(nn.Module):
    """Patches in, visual features out; in one go (`forward`) or in slices (`start`, `advance`, `finish`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, norm_merged=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, norm_merged=True) for _ in config.deepstack_visual_indexes
        )

    def forward(self, patches_P_X: Tensor, grids: Sequence[Grid], lora: Adapters | None = None) -> VisualFeatures:
        """The features of all pictures, in order."""
        vision_pass = self.start(patches_P_X, grids, lora)
        self.advance(vision_pass, math.inf)
        return self.finish(vision_pass)

    def start(self, patches_P_X: Tensor, grids: Sequence[Grid], lora: Adapters | None = None) -> VisionPass:
        """Embed patches and place them.

        Args:
            patches_P_X: normalised pixels, each patch flattened as (channel, frame, row, column).
            grids: of each picture; they tell pictures apart.
            lora: what the patches wear, in offsets of P.

        Raises:
            ValueError: a grid is not whole in merged patches or has several frames, or patches and grids
                disagree.
        """
        merge = self.config.spatial_merge_size
        for frames, rows, columns in grids:
            if frames != 1 or rows % merge or columns % merge or min(rows, columns) < merge:
                raise ValueError(
                    f"grid {(frames, rows, columns)}: one frame, and multiples of {merge} patches are needed"
                )
        lengths = [rows * columns for _, rows, columns in grids]
        expected = (sum(lengths), self.config.patch_values)
        if patches_P_X.shape != expected:
            raise ValueError(f"patches have shape {tuple(patches_P_X.shape)}, the grids need {expected}")
        weight = self.pos_embed.weight
        embedded_P_W = self.patch_embed.proj.project(patches_P_X.to(weight))
        placed_P_W = torch.cat([self._place(rows, columns) for _, rows, columns in grids])
        index = [_block_order(rows, columns, merge, weight.device) for _, rows, columns in grids]
        rows_P, columns_P = (torch.cat(axis) for axis in zip(*index, strict=True))
        return VisionPass(
            hidden_P_W=embedded_P_W + placed_P_W.to(weight.dtype),
            rotation=vision_rotation(rows_P, columns_P, self.config.head_dim, self.config.rope_theta),
            attention=PackedAttention(lengths, causal=False),
            lora=lora,
        )

    def advance(self, vision_pass: VisionPass, multiplications: float) -> bool:
        """Run on for about so many multiplications, a row of merged patches at least; True when the pass is done."""
        if vision_pass.slices is None:
            vision_pass.slices = self._slices(vision_pass, self._rows(vision_pass, multiplications))
        done = 0.0
        for part in vision_pass.slices:
            done += part
            if done >= multiplications:
                return False
        return True

    def finish(self, vision_pass: VisionPass) -> VisualFeatures:
        """The features of a pass that is done.

        Raises:
            ValueError: something is left to run.
        """
        if vision_pass.tokens_M_D is None:
            raise ValueError(f"the pass stands before block {vision_pass.layer} of {self.config.depth}")
        return VisualFeatures(vision_pass.tokens_M_D, tuple(vision_pass.deepstack_M_D))

    def _rows(self, vision_pass: VisionPass, multiplications: float) -> int:
        """Patches of a piece that stays within so many multiplications wherever in the pass it is."""
        config, patches = self.config, len(vision_pass.hidden_P_W)
        merge = config.spatial_merge_size**2
        longest = max((stop - start for start, stop in vision_pass.attention.bounds), default=0)
        in_block = config.hidden_size * (config.hidden_size + 2 * config.intermediate_size + 2 * longest)
        in_merger = config.merged_size * (config.merged_size + config.out_hidden_size) / merge
        pieces = multiplications / max(in_block, in_merger)
        return patches if pieces >= patches else max(merge, int(pieces) // merge * merge)

    def _slices(self, vision_pass: VisionPass, rows: int) -> Iterator[float]:
        taps, lora = self.config.deepstack_visual_indexes, vision_pass.lora
        for layer, block in enumerate(self.blocks):
            vision_pass.hidden_P_W = yield from block.pieces(  # type: ignore[operator]  # a VisionBlock
                vision_pass.hidden_P_W, vision_pass.rotation, vision_pass.attention, lora, rows
            )
            vision_pass.layer = layer + 1
            if layer in taps:
                merger = self.deepstack_merger_list[taps.index(layer)]
                level = yield from merger.pieces(vision_pass.hidden_P_W, lora, rows)  # type: ignore[operator]
                vision_pass.deepstack_M_D.append(level)
        vision_pass.tokens_M_D = yield from self.merger.pieces(vision_pass.hidden_P_W, lora, rows)

    def _place(self, rows: int, columns: int) -> Tensor:
        """The square of learned embeddings stretched to a picture, corners kept, in block order, (P, W)."""
        side = math.isqrt(self.config.num_position_embeddings)
        table = self.pos_embed.weight.float().view(side, side, -1)
        stretched = _stretch(_stretch(table, rows, dim=0), columns, dim=1)
        row_P, column_P = _block_order(rows, columns, self.config.spatial_merge_size, table.device)
        return stretched[row_P, column_P]


def _spans(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, max(size, 1))]


def _rows(lora: Adapters | None, start: int, stop: int) -> Adapters | None:
    return None if lora is None else lora.rows(start, stop)


def _whole(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _stretch(table: Tensor, size: int, dim: int) -> Tensor:
    """Linear interpolation of one axis to `size` points, the first and the last kept."""
    last = table.shape[dim] - 1
    place = torch.arange(size, dtype=torch.float32, device=table.device) * last / max(size - 1, 1)
    below = place.long()
    fraction = (place - below).unsqueeze(-1)
    if dim == 0:
        fraction = fraction.unsqueeze(-1)
    above = (below + 1).clamp(max=last)
    return torch.lerp(table.index_select(dim, below), table.index_select(dim, above), fraction)


def _block_order(rows: int, columns: int, merge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, in the order in which patches come: merge x merge blocks, row by row."""
    index = torch.arange(rows * columns, device=device).view(rows // merge, merge, columns // merge, merge)
    index = index.transpose(1, 2).flatten()
    return index // columns, index % columns
