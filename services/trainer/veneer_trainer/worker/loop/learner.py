"""One optimiser step, and the loss that it is taken on."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from veneer_trainer.worker.loop.batches import Pass, Step
from veneer_trainer.worker.loop.features import FrozenFeatures, trained_features
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.state import State
from veneer_trainer.worker.refusal import Refused
from veneer_vlm.attention import PackedAttention
from veneer_vlm.lora import AdapterBatch, DropoutKey
from veneer_vlm.loss import token_losses
from veneer_vlm.model import VisionLanguageModel


class Learner:
    """Moves an adapter.

    Args:
        model: the frozen base.
        state: of the run.
        plan: of the job.
        features: of pictures; None where the tower is trained too.
    """

    def __init__(self, model: VisionLanguageModel, state: State, plan: Plan, features: FrozenFeatures | None) -> None:
        self._model = model
        self._state = state
        self._plan = plan
        self._features = features
        self._weights = [tensor for _, tensor in state.adapter.tensors()]

    def learn(self, step: Step, rate: float) -> None:
        """Takes one optimiser step, and notes loss and gradient norm.

        The loss is the mean over all learned tokens of the step, however they are cut into passes: accumulated
        gradients are those of one large batch.

        Raises:
            Refused: NON_FINITE_LOSS; the adapter stays as it was.
        """
        figures, optimizer = self._state.figures, self._state.optimizer
        key = figures.step * self._plan.rows_per_step
        total = torch.zeros((), dtype=torch.float64)
        for each in step.passes:
            losses_N = self._losses(each, DropoutKey(figures.seed, key + each.first_row))
            torch.autograd.backward(losses_N.sum() / step.targets)
            total += losses_N.detach().sum(dtype=torch.float64)
        loss = total.item() / step.targets
        norm = torch.nn.utils.get_total_norm([tensor.grad for tensor in self._weights if tensor.grad is not None])
        gradient_norm = norm.item()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            text = f"loss {loss} and gradient norm {gradient_norm} at step {figures.step + 1}: lower the learning rate"
            raise Refused("NON_FINITE_LOSS", text)
        limit = self._plan.spec.optimizer.max_gradient_norm
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(self._weights, limit, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        figures.step += 1
        figures.loss, figures.gradient_norm = loss, gradient_norm

    @torch.no_grad()
    def loss(self, steps: Iterable[Step]) -> float:
        """Returns the mean loss of a learned token over all rows, without dropout."""
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for step in steps:
            for each in step.passes:
                total += self._losses(each, None).sum(dtype=torch.float64)
            targets += step.targets
        return total.item() / targets

    def _losses(self, each: Pass, dropout: DropoutKey | None) -> Tensor:
        """The loss (N,) of every learned token of a pass."""
        adapter, model = self._state.adapter, self._model
        if self._features is not None:
            visual = self._features.of(each.pictures)
        else:
            patches = sum(math.prod(picture.grid) for picture in each.pictures)
            visual = trained_features(model, each.pictures, AdapterBatch.uniform(adapter, patches, dropout))
        hidden_T_D = model(
            each.ids_T,
            each.positions_3_T,
            PackedAttention(each.lengths),
            visual,
            AdapterBatch.uniform(adapter, len(each.ids_T), dropout),
        )
        return token_losses(model.lm_head, hidden_T_D[each.predicting_N], each.targets_N)
