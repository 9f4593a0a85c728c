"""Several adapters as one: their factors in places of one memory, so that a step takes a few calls for any number.

Owns the packed factors and the arithmetic of a pass over few tokens with many adapters, as decoding is: a product for
each place and its tokens, all places in one call, which reads every factor once and at memory's pace: the compiled
library's where there is one (`native`), else torch's over tokens that are gathered and padded. An adapter that
comes takes the place of one that has left, and the others stay as they are. For inference alone: nothing flows back.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer_vlm import native
from veneer_vlm.lora import Adapter


@dataclasses.dataclass(frozen=True)
class _Packed:
    """The factors of linears that read one input, in S places; R is the pack's rank.

    Attributes:
        parts: of the linears, those P that any adapter adapts.
        a_S_PR_I: every A, scaled; zeros where an adapter has none, or fewer rows than R.
        b_P_S_R_O: for each part every B, turned; each of its own O.
        updates: the library's, on these very factors; None where it does not multiply them.
    """

    parts: tuple[int, ...]
    a_S_PR_I: Tensor
    b_P_S_R_O: tuple[Tensor, ...]
    updates: native.Updates | None

    def write(self, place: int, adapter: Adapter, names: tuple[str, ...]) -> None:
        """Has an adapter in a place; the linears `names` that it adapts are among the parts."""
        a_PR_I = self.a_S_PR_I[place].zero_()
        a_P_R_I = a_PR_I.view(len(self.parts), -1, a_PR_I.shape[1])
        for number, (part, b_S_R_O) in enumerate(zip(self.parts, self.b_P_S_R_O, strict=True)):
            b_R_O = b_S_R_O[place].zero_()
            pair = adapter.pairs.get(names[part])
            if pair is not None:
                torch.mul(pair.a_R_I, adapter.config.scale, out=a_P_R_I[number, : len(pair.a_R_I)])
                b_R_O[: len(pair.a_R_I)] = pair.b_O_R.T


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Where the N tokens of a pass that wear anything stand: in S rows, one for each place, of C tokens.

    Attributes:
        token_N: which tokens of the pass they are; None for all.
        index_N: where each stands.
        most: C.
        by_place_N: which tokens they are, place by place.
        starts: where each place's begin among those, and where the last ones end.
    """

    token_N: Tensor | None
    index_N: Tensor
    most: int
    by_place_N: Tensor
    starts: Tensor

    @classmethod
    def of(cls, place_T: Tensor, pack: "AdapterPack") -> "_Rows":
        """Of tokens with these places, -1 for none."""
        tokens = [(place_T == place).nonzero()[:, 0] for place in range(pack.places)]
        most = max(map(len, tokens))
        index_T = torch.full_like(place_T, -1)
        for place, own in enumerate(tokens):
            index_T[own] = most * place + torch.arange(len(own))
        token_N = (place_T >= 0).nonzero()[:, 0]
        index_N = index_T[token_N].to(pack.device)
        starts = torch.tensor([0, *map(len, tokens)]).cumsum(0)
        return cls(
            None if len(token_N) == len(place_T) else token_N.to(pack.device), index_N, most, torch.cat(tokens), starts
        )


class AdapterPack:
    """Room for adapters, whose factors are written, linear by linear, when a pass first needs them.

    Args:
        places: S, of adapters.
        rank: R, the greatest that one may have.
        device: of the adapters.
    """

    def __init__(self, places: int, rank: int, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.device = device
        self._held: list[Adapter | None] = [None] * places
        self._packed: dict[tuple[str, ...], _Packed | None] = {}

    @property
    def places(self) -> int:
        """S."""
        return len(self._held)

    def release(self, adapter: Adapter) -> None:
        """Forgets an adapter; its place is free for another."""
        self._held = [None if held is adapter else held for held in self._held]

    def place(self, adapters: Sequence[Adapter]) -> list[int]:
        """Where each of these adapters lies; those that are new here take the places of others.

        Args:
            adapters: as many as there are places at most, of the pack's rank at most; all of one dtype, on one device.
        """
        wanted = {id(adapter): adapter for adapter in adapters}
        at = {id(held): place for place, held in enumerate(self._held) if id(held) in wanted}
        others = [place for place in range(self.places) if place not in at.values()]
        free = sorted(others, key=lambda place: self._held[place] is None)  # the last is taken first
        for key, adapter in wanted.items():
            if key not in at:
                at[key] = free.pop()
                self._hold(at[key], adapter)
        return [at[id(adapter)] for adapter in adapters]

    def packed(self, columns: Mapping[str, slice]) -> _Packed | None:
        """The factors of linears, named with the columns of their outputs; None where no adapter has any."""
        names = tuple(columns)
        if names not in self._packed:
            self._packed[names] = self._pack(columns)
        return self._packed[names]

    def _hold(self, place: int, adapter: Adapter) -> None:
        self._held[place] = adapter
        for names, packed in list(self._packed.items()):
            parts = () if packed is None else packed.parts
            if any(name in adapter.pairs and part not in parts for part, name in enumerate(names)):
                del self._packed[names]  # made anew, with parts that nobody had
            elif packed is not None:
                packed.write(place, adapter, names)

    def _pack(self, columns: Mapping[str, slice]) -> _Packed | None:
        names = tuple(columns)
        pairs = [
            {part: held.pairs[name] for part, name in enumerate(names) if name in held.pairs}
            for held in self._held
            if held is not None
        ]
        shapes = {part: pair for worn in pairs for part, pair in worn.items()}
        if not shapes:
            return None
        parts = tuple(sorted(shapes))
        any_a_R_I = shapes[parts[0]].a_R_I
        a_S_PR_I = any_a_R_I.new_zeros(self.places, len(parts) * self.rank, any_a_R_I.shape[1])
        b_P_S_R_O = tuple(any_a_R_I.new_zeros(self.places, self.rank, len(shapes[part].b_O_R)) for part in parts)
        updates = None
        if all(native.takes(factors[0]) for factors in (a_S_PR_I, *b_P_S_R_O)):
            updates = native.Updates(a_S_PR_I, b_P_S_R_O, [list(columns.values())[part].start for part in parts])
        packed = _Packed(parts, a_S_PR_I, b_P_S_R_O, updates)
        for place, held in enumerate(self._held):
            if held is not None:
                packed.write(place, held, names)
        return packed


class PackedAdapterBatch:
    """What the tokens of a pass wear, out of a pack.

    Args:
        pack: the adapters.
        place_T: for each token the place of its adapter in the pack, on the CPU; -1 for none.
    """

    def __init__(self, pack: AdapterPack, place_T: Tensor) -> None:
        self._pack = pack
        self._place_T = place_T
        self._rows = _Rows.of(place_T, pack)

    @torch.no_grad()
    def add(self, columns: Mapping[str, slice], input_T_I: Tensor, output_T_O: Tensor) -> Tensor:
        """See `veneer_vlm.linear.Adapters`."""
        packed, rows = self._pack.packed(columns), self._rows
        if packed is None or not rows.most:
            return output_T_O
        if packed.updates is not None and native.takes(input_T_I) and native.takes(output_T_O):
            packed.updates.add(input_T_I, output_T_O, rows.by_place_N, rows.starts)
            return output_T_O
        a_S_PR_I = packed.a_S_PR_I
        places, _, inputs = a_S_PR_I.shape
        input_N_I = input_T_I if rows.token_N is None else input_T_I.index_select(0, rows.token_N)
        input_SC_I = a_S_PR_I.new_zeros(places * rows.most, inputs)
        input_SC_I.index_copy_(0, rows.index_N, input_N_I.to(input_SC_I.dtype))
        inner_S_C_PR = torch.bmm(input_SC_I.view(places, rows.most, inputs), a_S_PR_I.transpose(1, 2))
        slices = list(columns.values())
        inner_P = torch.split(inner_S_C_PR, self._pack.rank, -1)
        for part, inner_S_C_R, b_S_R_O in zip(packed.parts, inner_P, packed.b_P_S_R_O, strict=True):
            added_SC_O = torch.bmm(inner_S_C_R, b_S_R_O).flatten(0, 1)
            _add_rows(output_T_O[:, slices[part]], rows.token_N, added_SC_O.index_select(0, rows.index_N))
        return output_T_O

    def merged(self, size: int) -> "PackedAdapterBatch":
        """See `veneer_vlm.linear.Adapters`."""
        return PackedAdapterBatch(self._pack, self._place_T[::size])

    def rows(self, start: int, stop: int) -> "PackedAdapterBatch":
        """See `veneer_vlm.linear.Adapters`."""
        return PackedAdapterBatch(self._pack, self._place_T[start:stop])


def _add_rows(output_T_O: Tensor, token_N: Tensor | None, added_N_O: Tensor) -> None:
    """Adds to some rows or all, rounded once into their dtype."""
    if token_N is None:
        output_T_O.copy_(added_N_O.add_(output_T_O))
    else:
        exact_N_O = added_N_O.add_(output_T_O.index_select(0, token_N))
        output_T_O.index_copy_(0, token_N, exact_N_O.to(output_T_O.dtype))
