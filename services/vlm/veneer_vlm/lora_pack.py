"""Several adapters as one: their factors packed, so that a step costs the same few products for any number of them.

Owns the packed factors and the arithmetic of a pass over few tokens with many adapters, as decoding is. It does more
multiplications than `lora.AdapterBatch` (each token meets every packed A, and what is not its own is dropped), in far
fewer and larger products. For inference alone: nothing flows back.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer_vlm.lora import Adapter
from veneer_vlm.lora_update import add_product


@dataclasses.dataclass(frozen=True)
class _Packed:
    """The factors of linears that read one input.

    Attributes:
        a_R_I: every A of every part, scaled, one below another.
        owner_R: which adapter each of its rows belongs to.
        parts: for each linear the rows of `a_R_I` that are its own, and its B as (O, R); None where nobody adapts it.
    """

    a_R_I: Tensor
    owner_R: Tensor
    parts: tuple[tuple[slice, Tensor] | None, ...]


class AdapterPack:
    """Adapters whose factors were packed, linear by linear, when a pass first needed them.

    Args:
        adapters: at least one; all of one dtype, on one device.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)
        self._packed: dict[tuple[str, ...], _Packed | None] = {}

    @property
    def rank(self) -> int:
        """Of all adapters together."""
        return sum(adapter.config.r for adapter in self.adapters)

    def packed(self, names: tuple[str, ...]) -> _Packed | None:
        """The factors of the linears `names`; None where no adapter has any."""
        if names not in self._packed:
            self._packed[names] = self._pack(names)
        return self._packed[names]

    def _pack(self, names: tuple[str, ...]) -> _Packed | None:
        rows: list[Tensor] = []
        owners: list[int] = []
        parts: list[tuple[slice, Tensor] | None] = []
        for name in names:
            worn = [(owner, adapter) for owner, adapter in enumerate(self.adapters) if name in adapter.pairs]
            start = len(owners)
            for owner, adapter in worn:
                rows.append(adapter.pairs[name].a_R_I * adapter.config.scale)
                owners += [owner] * adapter.config.r
            columns = [adapter.pairs[name].b_O_R for _, adapter in worn]
            parts.append((slice(start, len(owners)), torch.cat(columns, 1)) if worn else None)
        if not rows:
            return None
        return _Packed(torch.cat(rows), torch.tensor(owners, device=rows[0].device), tuple(parts))


class PackedAdapterBatch:
    """What the tokens of a pass wear, out of a pack.

    Args:
        pack: the adapters.
        owner_T: for each token the number of its adapter in the pack; -1 for none.
    """

    def __init__(self, pack: AdapterPack, owner_T: Tensor) -> None:
        self._pack = pack
        self._owner_T = owner_T

    @torch.no_grad()
    def add(self, columns: Mapping[str, slice], input_T_I: Tensor, output_T_O: Tensor) -> Tensor:
        """See `veneer_vlm.linear.Adapters`."""
        packed = self._pack.packed(tuple(columns))
        if packed is None:
            return output_T_O
        inner_T_R = F.linear(input_T_I.to(packed.a_R_I.dtype), packed.a_R_I)
        # Filled, not multiplied by zero: what another adapter makes of this token may be infinite.
        inner_T_R = inner_T_R.masked_fill(self._owner_T[:, None] != packed.owner_R, 0)
        for here, part in zip(columns.values(), packed.parts, strict=True):
            if part is not None:
                add_product(output_T_O[:, here], inner_T_R[:, part[0]], part[1])
        return output_T_O

    def merged(self, size: int) -> "PackedAdapterBatch":
        """See `veneer_vlm.linear.Adapters`."""
        return PackedAdapterBatch(self._pack, self._owner_T[::size])

    def rows(self, start: int, stop: int) -> "PackedAdapterBatch":
        """See `veneer_vlm.linear.Adapters`."""
        return PackedAdapterBatch(self._pack, self._owner_T[start:stop])
