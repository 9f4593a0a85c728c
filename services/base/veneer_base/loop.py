"""The training loop of the base.

Owns steps, the optimiser, checkpoints and the log. What is learnt is in `stages`, the data in `batches`.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from veneer_base import reading
from veneer_base.alphabet import CHARACTERS
from veneer_base.batches import BINS, NO_LABEL, Batch, Composer
from veneer_base.stages import Stage

LONGEST_LINE = 40  # characters


class SpellingHead(nn.Module):
    """The discarded head: for each part of a visual token, whether a character's middle is in it, and which one.

    It makes the tower spell out what it sees; without it the decoder finds nothing to point at.
    """

    def __init__(self, hidden: int, part: int = 96) -> None:
        super().__init__()
        self.parts = nn.Linear(hidden, BINS * part)
        self.present = nn.Linear(part, 1)
        self.character = nn.Linear(part, len(CHARACTERS))
        self.order = nn.Linear(hidden, LONGEST_LINE)

    def loss(self, visual_B_M_D: Tensor, spots_K_5: Tensor, order_weight: float) -> tuple[Tensor, Tensor]:
        """The loss, and the share of characters that are right."""
        B, M, _ = visual_B_M_D.shape
        parts = F.gelu(self.parts(visual_B_M_D).view(B, M, BINS, -1))
        b, cell, part, character, number = spots_K_5.unbind(1)
        logits = self.character(parts[b, cell, part])
        there = torch.zeros(B, M, BINS)
        there[b, cell, part] = 1
        presence = F.binary_cross_entropy_with_logits(self.present(parts).squeeze(-1), there)
        loss = F.cross_entropy(logits, character) + presence
        if order_weight:
            first = torch.full((B * M,), LONGEST_LINE).scatter_reduce(0, b * M + cell, number, "amin").view(B, M)
            occupied = first < LONGEST_LINE
            loss = loss + order_weight * F.cross_entropy(self.order(visual_B_M_D[occupied]), first[occupied])
        return loss, (logits.argmax(-1) == character).float().mean()


@dataclasses.dataclass(frozen=True)
class Losses:
    """What a step says of itself."""

    total: Tensor
    spelling: Tensor
    spelt_right: Tensor
    answers: Tensor
    tokens_right: Tensor


def losses(model: Qwen3VLForConditionalGeneration, head: SpellingHead, stage: Stage, batch: Batch) -> Losses:
    """The forward pass of one batch."""
    _, H, W, _ = batch.pictures_B_H_W_3.shape
    grid = reading.Grid(H // reading.CELL_PX, W // reading.CELL_PX)
    visual, taps = reading.see(model, reading.patches(batch.pictures_B_H_W_3), grid)
    spelling, spelt_right = head.loss(visual, torch.from_numpy(batch.spots_K_5), stage.order_weight)
    if not stage.decodes:
        nothing = torch.zeros(())
        return Losses(spelling, spelling, spelt_right, nothing, nothing)
    if not stage.tower_learns:
        visual, taps = visual.detach(), [tap.detach() for tap in taps]
    labels_B_L = torch.from_numpy(batch.labels_B_L)
    states = reading.read(
        model, torch.from_numpy(batch.ids_B_L), torch.from_numpy(batch.segments_B_L), visual, taps, grid
    )
    answered = labels_B_L != NO_LABEL
    # Logits of the whole vocabulary only where an answer is: they are the dearest part of a small model's step.
    logits = model.lm_head(states[answered])
    answers = F.cross_entropy(logits, labels_B_L[answered])
    right = (logits.argmax(-1) == labels_B_L[answered]).float().mean()
    return Losses(answers + stage.spelling_weight * spelling, spelling, spelt_right, answers, right)


def rate(stage: Stage, step: int) -> float:
    """The learning rate of a stage's step."""
    first, last = stage.rates
    cosine = last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return cosine * min(1.0, (step + 1) / stage.warmup_steps)


class Run:
    """A training run that can be stopped and resumed.

    Args:
        model: in its fresh state.
        composer: of the batches.
        stages: the curriculum.
        folder: for checkpoints and the log.

    Where `torch.distributed` is set up, each process takes its share of every batch and all of them hold equal weights:
    two processes of one thread are faster than one process of two, whose threads wait for each other in every small
    operation. The first process writes.
    """

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        composer: Composer,
        stages: tuple[Stage, ...],
        folder: Path,
    ) -> None:
        self.model, self.composer, self.stages, self.folder = model, composer, stages, folder
        self.shares = dist.get_world_size() if dist.is_initialized() else 1
        self.share = dist.get_rank() if dist.is_initialized() else 0
        self.head = SpellingHead(cast(Any, model.config.vision_config).out_hidden_size)
        self.named = dict(model.named_parameters()) | {f"head.{n}": p for n, p in self.head.named_parameters()}
        matrices = [p for p in self.named.values() if p.ndim > 1]
        vectors = [p for p in self.named.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.at = (0, 0)  # stage, step
        folder.mkdir(parents=True, exist_ok=True)

    def train(self, checkpoint_steps: int = 250, log_steps: int = 50, stop_at: tuple[int, int] | None = None) -> None:
        """Trains from where the run is to the end, or to a stage and step."""
        began, window = time.monotonic(), []
        for number, step in self._places():
            if (number, step) == stop_at:
                break
            stage = self.stages[number]
            window.append(self.step(stage, step, self.composer.compose(stage, step, self.share, self.shares)))
            self.at = (number, step + 1) if step + 1 < stage.steps else (number + 1, 0)
            if self.share:
                continue
            if (step + 1) % log_steps == 0:
                self._log(stage, step + 1, time.monotonic() - began, window)
                window = []
            if (step + 1) % checkpoint_steps == 0 or step + 1 == stage.steps:
                self.save(self.folder / "checkpoint.safetensors")
            if step + 1 == stage.steps:
                self.save(self.folder / f"{number}-{stage.name}.safetensors")

    def _places(self) -> Iterator[tuple[int, int]]:
        """Stage numbers and steps, from where the run is to the end."""
        for number, stage in enumerate(self.stages):
            for step in range(stage.steps):
                if (number, step) >= self.at:
                    yield number, step

    def step(self, stage: Stage, step: int, batch: Batch) -> list[float]:
        """One optimiser step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(stage, step)
        result = losses(self.model, self.head, stage, batch)
        result.total.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        moved = [p for p in self.named.values() if p.grad is not None]
        if self.shares > 1:
            _average([p.grad for p in moved if p.grad is not None], self.shares)
        nn.utils.clip_grad_norm_(moved, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return [t.item() for t in (result.spelling, result.spelt_right, result.answers, result.tokens_right)]

    def save(self, path: Path) -> None:
        """Writes weights, optimiser and place; a file that is there is replaced in one rename."""
        tensors = {name: p.detach() for name, p in self.named.items()}
        for name, p in self.named.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        fresh = path.with_suffix(".tmp")
        save_file(tensors, fresh, metadata={"stage": str(self.at[0]), "step": str(self.at[1])})
        fresh.replace(path)

    def load(self, path: Path, *, keep_place: bool = True) -> None:
        """Reads what `save` wrote."""
        tensors = load_file(path)
        with torch.no_grad():
            for name, p in self.named.items():
                if name in tensors:
                    p.copy_(tensors[name])
        for name, p in self.named.items():
            state = {
                key: tensors[f"adam.{key}.{name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"adam.{key}.{name}" in tensors
            }
            if state:
                self.optimizer.state[p] = state
        if keep_place:
            with safe_open(path, "pt") as file:
                place = file.metadata()
            self.at = (int(place["stage"]), int(place["step"]))

    def _log(self, stage: Stage, step: int, seconds: float, window: list[list[float]]) -> None:
        spelling, spelt_right, answers, tokens_right = (
            sum(column) / len(window) for column in zip(*window, strict=True)
        )
        entry = {
            "stage": stage.name, "step": step, "seconds": round(seconds), "rate": round(rate(stage, step), 6),
            "spelling": round(spelling, 4), "spelt_right": round(spelt_right, 4),
            "answers": round(answers, 4), "tokens_right": round(tokens_right, 4),
        }  # fmt: skip
        line = json.dumps(entry)
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _average(gradients: list[Tensor], shares: int) -> None:
    """Sets each gradient to its mean over the processes."""
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= shares
    parts = flat.split([g.numel() for g in gradients])  # type: ignore[no-untyped-call]  # torch gives it no types
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
