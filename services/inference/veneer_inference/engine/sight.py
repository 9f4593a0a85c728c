"""Pictures to features: through the tower a slice at a time, and kept for whoever shows the same picture again.

A slice is so many multiplications, whatever the picture's size, so that a large picture never holds up the answers
under way for long. A picture that several requests show while it is under way goes through once. Features are kept by
tenant, picture, grid and, where the adapter touches tower or merger, adapter; the base is the engine's own and never
changes. The grid stands for the processing contract: a picture is resized straight to it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer_inference.engine.slots import BASE
from veneer_vlm.layout import TOWER
from veneer_vlm.lora import Adapter, AdapterBatch, Segment
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.vision import Grid, VisionPass, VisualFeatures

FeatureKey = tuple[str, str, Grid, str]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a request that waits for its features.

    Attributes:
        request: key of the request.
        index: which of its pictures.
        grid: in patches.
        patches_P_X: of it.
        adapter: what the patches wear; None where it leaves the tower alone.
        adapter_digest: of that; empty for None.
        key: under which the features are kept; None where its picture has no digest.
    """

    request: int
    index: int
    grid: Grid
    patches_P_X: Tensor
    adapter: Adapter | None
    adapter_digest: str
    key: FeatureKey | None


class FeatureCache:
    """Features within a bound of bytes; those used longest ago go first.

    Args:
        capacity_bytes: of all of them; 0 keeps nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._features: OrderedDict[FeatureKey, VisualFeatures] = OrderedDict()
        self.size_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: FeatureKey | None) -> VisualFeatures | None:
        """The features, if they are kept."""
        features = None if key is None else self._features.get(key)
        if features is None or key is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(key)
        return features

    def put(self, key: FeatureKey, features: VisualFeatures) -> None:
        """Keeps features, if they fit at all."""
        size = _size_bytes(features)
        if key in self._features or size > self._capacity_bytes:
            return
        # A row of a batch is a view of all of it: kept alone, it must not keep the others.
        self._features[key] = VisualFeatures(
            features.tokens_M_D.clone(), tuple(level.clone() for level in features.deepstack_M_D)
        )
        self.size_bytes += size
        while self.size_bytes > self._capacity_bytes:
            _, old = self._features.popitem(last=False)
            self.size_bytes -= _size_bytes(old)


class Sight:
    """The tower's work.

    Args:
        model: the base.
        slice_multiplications: of a slice, about.
        cache_bytes: of kept features.
    """

    def __init__(self, model: VisionLanguageModel, slice_multiplications: int, cache_bytes: int) -> None:
        self.cache = FeatureCache(cache_bytes)
        self._tower = model.visual
        self._merge = model.config.vision.spatial_merge_size**2
        self._device = model.device
        self._slice_multiplications = slice_multiplications
        self._waiting: deque[Picture] = deque()
        self._batch: list[Picture] = []  # what goes through the tower now
        self._sharers: dict[FeatureKey, list[Picture]] = {}  # of what waits or goes through; they wait for the same
        self._pass: VisionPass | None = None

    @property
    def busy(self) -> bool:
        """Pictures wait or are under way."""
        return bool(self._waiting or self._batch)

    def show(self, picture: Picture) -> VisualFeatures | None:
        """The features of a picture, if they are kept; else it waits for the tower."""
        if picture.key is not None and (sharers := self._sharers.get(picture.key)) is not None:
            sharers.append(picture)
            self.cache.hits += 1
            return None
        features = self.cache.get(picture.key)
        if features is None:
            self._waiting.append(picture)
            if picture.key is not None:
                self._sharers[picture.key] = []
        return features

    def forget(self, request: int) -> None:
        """A request has ended: its pictures that wait need not be seen, unless another one waits for the same."""
        for sharers in self._sharers.values():
            sharers[:] = [picture for picture in sharers if picture.request != request]
        waiting, self._waiting = self._waiting, deque()
        for picture in waiting:
            if picture.request != request:
                self._waiting.append(picture)
            elif picture.key is not None and (sharers := self._sharers.pop(picture.key)):
                self._waiting.append(sharers[0])
                self._sharers[picture.key] = sharers[1:]

    def advance(self) -> list[tuple[Picture, VisualFeatures]]:
        """Runs a slice; the pictures that are through, with their features."""
        if self._pass is None:
            self._batch = self._next_batch()
            if not self._batch:
                return []
            patches_P_X = torch.cat([picture.patches_P_X for picture in self._batch]).to(self._device)
            grids = [picture.grid for picture in self._batch]
            self._pass = self._tower.start(patches_P_X, grids, _worn(self._batch))
        if not self._tower.advance(self._pass, self._slice_multiplications):
            return []
        features = self._tower.finish(self._pass)
        batch = self._take_batch()
        seen = []
        start = 0
        for picture in batch:
            stop = start + len(picture.patches_P_X) // self._merge
            sharers = [] if picture.key is None else self._sharers.pop(picture.key)
            seen += [(each, features[start:stop]) for each in (picture, *sharers)]
            if picture.key is not None:
                self.cache.put(picture.key, features[start:stop])
            start = stop
        return seen

    def give_up(self) -> list[int]:
        """Forgets the pictures that are under way, after an error; the requests that showed them."""
        batch = self._take_batch()
        sharers = [each for picture in batch if picture.key is not None for each in self._sharers.pop(picture.key)]
        return [picture.request for picture in (*batch, *sharers)]

    def _take_batch(self) -> list[Picture]:
        batch, self._batch, self._pass = self._batch, [], None
        return batch

    def _next_batch(self) -> list[Picture]:
        """Pictures that go through together in one slice, or one larger one; those of one adapter side by side."""
        pictures: list[Picture] = []
        config = self._tower.config
        of_patch = config.depth * 2 * config.hidden_size * (2 * config.hidden_size + config.intermediate_size)
        room = self._slice_multiplications // of_patch
        while self._waiting and (not pictures or len(self._waiting[0].patches_P_X) <= room):
            pictures.append(self._waiting.popleft())
            room -= len(pictures[-1].patches_P_X)
        return sorted(pictures, key=lambda picture: picture.adapter_digest)


def touches_tower(adapter: Adapter) -> bool:
    """Whether features depend on the adapter."""
    return any(name.startswith(TOWER) for name in adapter.pairs)


def feature_key(tenant: str, digest: str, grid: Grid, adapter_digest: str = BASE) -> FeatureKey:
    """Under which features are kept.

    Args:
        tenant: whose picture it is: no tenant can tell from a time what another one has shown.
        digest: SHA-256 of the picture's file.
        grid: what it was resized to.
        adapter_digest: of an adapter that touches tower or merger.
    """
    return tenant, digest, grid, adapter_digest


def _worn(pictures: Sequence[Picture]) -> AdapterBatch | None:
    segments: list[Segment] = []
    start = 0
    for picture in pictures:
        stop = start + len(picture.patches_P_X)
        if picture.adapter is not None:
            if segments and segments[-1].adapter is picture.adapter and segments[-1].stop == start:
                segments[-1] = Segment(picture.adapter, segments[-1].start, stop)
            else:
                segments.append(Segment(picture.adapter, start, stop))
        start = stop
    return AdapterBatch(segments) if segments else None


def _size_bytes(features: VisualFeatures) -> int:
    return features.tokens_M_D.nbytes + sum(level.nbytes for level in features.deepstack_M_D)
