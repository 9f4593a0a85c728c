"""What a run is made of between two steps, and the checkpoint that holds just that."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer_trainer.failpoints import failpoint
from veneer_trainer.worker.loop.adamw import MOMENTS, AdamW
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.refusal import Refused
from veneer_vlm import peft_folder
from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import AdapterError
from veneer_vlm.lora import Adapter

_ADAPTER, _OPTIMIZER, _BEST, _STATE = "adapter.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"


@dataclass(slots=True)
class Figures:
    """What a run has come to.

    Attributes:
        step: optimiser steps done. With the seed it says which rows come next, and every dropout mask: there is no
            other cursor and no other random state.
        elapsed_s: spent in steps, over all attempts.
        validated_step: when validation loss was measured last; -1 before the first time.
        waited: validations since the last that was better.
    """

    step: int = 0
    seed: int = 0
    elapsed_s: float = 0.0
    loss: float = 0.0
    gradient_norm: float = 0.0
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    validated_step: int = -1
    waited: int = 0


@dataclass
class State:
    """Adapter, optimiser and figures."""

    adapter: Adapter
    optimizer: AdamW
    figures: Figures
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def fresh(cls, config: ModelConfig, plan: Plan) -> State:
        """A run before its first step; raises TargetError."""
        adapter = Adapter.new(config, plan.adapter, plan.spec.seed, device=plan.device)
        for _, tensor in adapter.tensors():
            tensor.requires_grad_()
        settings = plan.spec.optimizer
        weights = [tensor for _, tensor in adapter.tensors()]
        optimizer = AdamW(weights, (settings.beta1, settings.beta2), settings.weight_decay)
        return cls(adapter, optimizer, Figures(seed=plan.spec.seed))

    def start_from(self, folder: Path, config: ModelConfig) -> None:
        """Takes the weights of a PEFT folder; the optimiser starts afresh.

        Raises:
            Refused: it is not of the job's base, rank, scale or targets.
        """
        try:
            initial = peft_folder.read(folder, config)
        except AdapterError as error:
            raise Refused("INITIAL_ADAPTER_UNUSABLE", "; ".join(error.violations)) from error
        theirs, weights = initial.config, dict(initial.tensors())
        ours = self.adapter.config
        if (theirs.r, theirs.scale) != (ours.r, ours.scale) or initial.pairs.keys() != self.adapter.pairs.keys():
            raise Refused("INITIAL_ADAPTER_DIFFERS", "its rank, scale or targets are not the job's")
        with torch.no_grad():
            for name, tensor in self.adapter.tensors():
                tensor.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Writes a checkpoint into a new folder."""
        folder.mkdir(parents=True)
        save_file(self._weights(), folder / _ADAPTER)
        moments = {
            f"{name}.{moment}": self.optimizer.state[tensor][moment]
            for name, tensor in self.adapter.tensors()
            for moment in MOMENTS
            if tensor in self.optimizer.state
        }
        failpoint("checkpoint.half")
        save_file(moments, folder / _OPTIMIZER)
        if self.best:
            save_file(self.best, folder / _BEST)
        (folder / _STATE).write_text(json.dumps(asdict(self.figures), indent=2) + "\n", "utf-8")

    def restore(self, folder: Path) -> None:
        """Reads what `save` wrote for the same job.

        Raises:
            Refused: it is no checkpoint of this job.
        """
        try:
            raw: dict[str, Any] = json.loads((folder / _STATE).read_text("utf-8"))
            weights, moments = load_file(folder / _ADAPTER), load_file(folder / _OPTIMIZER)
            self.figures = Figures(**raw)
            with torch.no_grad():
                for name, tensor in self.adapter.tensors():
                    tensor.copy_(weights.pop(name))
                    its = {
                        moment: moments.pop(f"{name}.{moment}").to(tensor.device)
                        for moment in MOMENTS
                        if f"{name}.{moment}" in moments
                    }
                    if its:
                        self.optimizer.state[tensor] = its
            self.best = load_file(folder / _BEST) if (folder / _BEST).exists() else {}
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise Refused("CHECKPOINT_UNUSABLE", f"the checkpoint does not fit the job: {error}") from error
        if weights or moments:
            raise Refused("CHECKPOINT_UNUSABLE", f"the checkpoint holds {[*weights, *moments][0]}, the job does not")

    def keep_best(self) -> None:
        """Notes the adapter as the best so far."""
        self.best = {name: tensor.clone() for name, tensor in self._weights().items()}

    def take_best(self) -> None:
        """Goes back to the best adapter so far, where one was noted."""
        with torch.no_grad():
            for name, tensor in self.adapter.tensors():
                if name in self.best:
                    tensor.copy_(self.best[name])

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.adapter.tensors()}
