"""The vision tower over the packed patches of several pictures.

Owns patch embedding, blocks, mergers, and a pass that can be cut into slices of layers, so that an engine may
run other work in between. Patches come from `veneer_processing`, block by block: the merge² patches that
become one visual token lie next to each other.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer_vlm.attention import PackedAttention
from veneer_vlm.config import VisionConfig
from veneer_vlm.linear import Adapters, Linear
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
    """

    hidden_P_W: Tensor
    rotation: Rotation
    attention: PackedAttention
    lora: Adapters | None
    layer: int = 0
    deepstack_M_D: list[Tensor] = dataclasses.field(default_factory=list)


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

    def forward(
        self,
        hidden_P_W: Tensor,
        rotation: Rotation,
        attention: PackedAttention,
        layer: int,
        lora: Adapters | None,
    ) -> Tensor:
        """(P, W)."""
        qkv_P_3_H_K = self.qkv(hidden_P_W, lora).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv_P_3_H_K.unbind(1)
        gathered_P_H_K = attention(layer, rotate(query, rotation), rotate(key, rotation), value)
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

    def forward(
        self,
        hidden_P_W: Tensor,
        rotation: Rotation,
        attention: PackedAttention,
        layer: int,
        lora: Adapters | None,
    ) -> Tensor:
        """(P, W)."""
        hidden_P_W = hidden_P_W + self.attn(self.norm1(hidden_P_W), rotation, attention, layer, lora)
        hidden_P_W = hidden_P_W + self.mlp(self.norm2(hidden_P_W), lora)
        return hidden_P_W


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


def _side_by_side(hidden_P_W: Tensor, merge: int) -> Tensor:
    return hidden_P_W.view(-1, merge * hidden_P_W.shape[-1])


class VisionTower(nn.Module):
    """Patches in, visual features out; in one go (`forward`) or in slices (`start`, `advance`, `finish`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, norm_merged=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, norm_merged=True) for _ in config.deepstack_visual_indexes
        )

    def forward(self, patches_P_X: Tensor, grids: Sequence[Grid], lora: Adapters | None = None) -> VisualFeatures:
        """The features of all pictures, in order."""
        vision_pass = self.start(patches_P_X, grids, lora)
        self.advance(vision_pass, self.config.depth)
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

    def advance(self, vision_pass: VisionPass, layers: int) -> bool:
        """Run up to `layers` more blocks; True when the last one is done."""
        taps = self.config.deepstack_visual_indexes
        stop = min(vision_pass.layer + layers, self.config.depth)
        for layer in range(vision_pass.layer, stop):
            vision_pass.hidden_P_W = self.blocks[layer](
                vision_pass.hidden_P_W, vision_pass.rotation, vision_pass.attention, layer, vision_pass.lora
            )
            if layer in taps:
                merger = self.deepstack_merger_list[taps.index(layer)]
                vision_pass.deepstack_M_D.append(merger(vision_pass.hidden_P_W, vision_pass.lora))
        vision_pass.layer = stop
        return stop == self.config.depth

    def finish(self, vision_pass: VisionPass) -> VisualFeatures:
        """The features of a pass that went through all blocks.

        Raises:
            ValueError: blocks are left to run.
        """
        if vision_pass.layer != self.config.depth:
            raise ValueError(f"the pass stands before block {vision_pass.layer} of {self.config.depth}")
        tokens_M_D = self.merger(vision_pass.hidden_P_W, vision_pass.lora)
        return VisualFeatures(tokens_M_D, tuple(vision_pass.deepstack_M_D))

    def _place(self, rows: int, columns: int) -> Tensor:
        """The square of learned embeddings stretched to a picture, corners kept, in block order, (P, W)."""
        side = math.isqrt(self.config.num_position_embeddings)
        table = self.pos_embed.weight.float().view(side, side, -1)
        stretched = _stretch(_stretch(table, rows, dim=0), columns, dim=1)
        row_P, column_P = _block_order(rows, columns, self.config.spatial_merge_size, table.device)
        return stretched[row_P, column_P]


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
