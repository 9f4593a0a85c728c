"""From rows to what a step computes: packed passes, made ahead of the step in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from veneer_processing import Processor
from veneer_trainer.domain.estimate import PASS_TOKENS
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.ranks import ALONE, Ranks
from veneer_trainer.worker.loop.rows import Row, Split
from veneer_vlm.vision import Grid, VisualFeatures

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture of a pass, with its patches, or with its features where they were known."""

    sha256: str
    grid: Grid
    patches_P_X: Tensor | None
    features: VisualFeatures | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that are computed together, packed without padding.

    Attributes:
        first_row: its number within the step, which names the pass.
        ids_T: of all rows, one after another.
        positions_3_T: likewise.
        lengths: tokens of each row.
        predicting_N: positions whose hidden state predicts a learned token.
        targets_N: the learned tokens.
        pictures: in the order of their tokens.
    """

    first_row: int
    ids_T: Tensor
    positions_3_T: Tensor
    lengths: tuple[int, ...]
    predicting_N: Tensor
    targets_N: Tensor
    pictures: tuple[Seen, ...]

    def to(self, device: torch.device) -> Pass:
        """The same with its tokens on a device; pictures stay, whoever makes their features moves those."""
        tensors = ("ids_T", "positions_3_T", "predicting_N", "targets_N")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in tensors})


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimiser step learns from.

    Attributes:
        passes: of this rank.
        rows: of all ranks.
        tokens: of all ranks.
    """

    passes: tuple[Pass, ...]
    rows: int
    tokens: int

    @property
    def targets(self) -> int:
        """Tokens that this rank learns."""
        return sum(len(each.targets_N) for each in self.passes)


Known = Callable[[str], VisualFeatures | None]
"""A picture's features, where they are known already."""


class Batches:
    """Makes steps of rows.

    Args:
        processor: makes patches.
        plan: of the job.
        known: see `Known`.
        ranks: who shares each step's rows.
    """

    def __init__(self, processor: Processor, plan: Plan, known: Known, ranks: Ranks = ALONE) -> None:
        self._processor = processor
        self._plan = plan
        self._known = known
        self._ranks = ranks

    def training(self, split: Split, first_step: int, total_steps: int) -> Iterator[Step]:
        """Yields the job's steps from one on: each epoch in its own order, none across two."""
        size, seed = self._plan.rows_per_step, self._plan.spec.seed
        per_epoch = self._plan.steps_per_epoch(split.used_rows)
        step = first_step
        while step < total_steps:
            epoch, within = divmod(step, per_epoch)
            for rows in _chunks(split.epoch(seed, epoch, within * size), size):
                yield self.step(rows)
                step += 1
                if step == total_steps:
                    return

    def validation(self, split: Split) -> Iterator[Step]:
        """Yields all rows in stored order."""
        for rows in _chunks(split.stored(), self._plan.rows_per_step):
            yield self.step(rows)

    def step(self, rows: Sequence[Row]) -> Step:
        """Packs this rank's rows: whole batches, as many together as stay within `PASS_TOKENS`."""
        size = self._plan.spec.batch_size
        passes: list[Pass] = []
        together: list[Row] = []
        own = self._ranks.share(len(rows))
        for start in range(own.start, own.stop, size):
            batch = rows[start : min(start + size, own.stop)]
            if together and _tokens(together) + _tokens(batch) > PASS_TOKENS:
                passes.append(self._pass(start - len(together), together))
                together = []
            together += batch
        if together:
            passes.append(self._pass(own.stop - len(together), together))
        return Step(tuple(passes), len(rows), _tokens(rows))

    def _pass(self, first_row: int, rows: Sequence[Row]) -> Pass:
        encoded = [row.encoded for row in rows]
        ids_T = np.concatenate([each.ids_T for each in encoded])
        supervised_N = np.concatenate([each.supervised_T for each in encoded]).nonzero()[0]
        pictures = []
        for row in rows:
            for picture, (frames, height, width) in zip(row.pictures, row.encoded.grids_n_3.tolist(), strict=True):
                features = self._known(picture.sha256)
                patches = torch.from_numpy(self._processor.patches(picture)) if features is None else None
                pictures.append(Seen(picture.sha256, (frames, height, width), patches, features))
        return Pass(
            first_row,
            torch.from_numpy(ids_T),
            torch.from_numpy(np.concatenate([each.positions_3_T for each in encoded], axis=1)),
            tuple(len(each.ids_T) for each in encoded),
            torch.from_numpy(supervised_N - 1),
            torch.from_numpy(ids_T[supervised_N]),
            tuple(pictures),
        )


class Ahead(Generic[_T]):
    """Items of an iterable, made by a thread while others are used.

    Args:
        source: run in the thread; what it raises is raised to who takes.
        depth: items at most that wait.
    """

    def __init__(self, source: Iterable[_T], depth: int = 2) -> None:
        self._ready: queue.Queue[tuple[_T | None, BaseException | None]] = queue.Queue(depth)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(source,), name="batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_T]:
        """Yields the items."""
        while True:
            item, problem = self._ready.get()
            if problem is not None:
                raise problem
            if item is None:
                return
            yield item

    def close(self) -> None:
        """Ends the thread once it has made what it is making."""
        self._over.set()

    def _make(self, source: Iterable[_T]) -> None:
        try:
            for item in source:
                self._put(item, None)
                if self._over.is_set():
                    return
            self._put(None, None)
        except BaseException as problem:
            self._put(None, problem)

    def _put(self, item: _T | None, problem: BaseException | None) -> None:
        while not self._over.is_set():
            try:
                return self._ready.put((item, problem), timeout=0.1)
            except queue.Full:
                continue


def _tokens(rows: Iterable[Row]) -> int:
    return sum(len(row.encoded.ids_T) for row in rows)


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
