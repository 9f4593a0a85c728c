"""One optimiser step of one job, or of several jobs in shared passes, and the loss that it is taken on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor

from veneer_trainer.domain.estimate import PASS_TOKENS
from veneer_trainer.failpoints import failpoint
from veneer_trainer.worker.loop.batches import Pass, Step
from veneer_trainer.worker.loop.features import FrozenFeatures, trained_features
from veneer_trainer.worker.loop.gauges import free_memory_bytes
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.ranks import ALONE, Ranks
from veneer_trainer.worker.loop.state import State
from veneer_trainer.worker.refusal import Refused
from veneer_vlm.attention import PackedAttention
from veneer_vlm.lora import AdapterBatch, DropoutKey, Segment
from veneer_vlm.loss import token_losses
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.vision import VisualFeatures

_ACTIVATIONS_SHARE = 0.5  # of the free memory: products and other processes want some too
_log = structlog.get_logger(__name__)


class Learner:
    """Moves an adapter.

    Args:
        model: the frozen base.
        state: of the run.
        plan: of the job.
        features: of pictures; None where the tower is trained too.
        ranks: who trains it together.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        state: State,
        plan: Plan,
        features: FrozenFeatures | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.state = state
        self.plan = plan
        self.features = features
        self._ranks = ranks
        self._largest_pass = 0
        self._weights = [tensor for _, tensor in state.adapter.tensors()]

    def learn(self, step: Step, rate: float) -> None:
        """Takes one optimiser step, and notes loss and gradient norm.

        Raises:
            Refused: NON_FINITE_LOSS; the adapter stays as it was.
        """
        (problem,) = learn_together([Turn(self, step, rate)])
        if problem is not None:
            raise problem

    @torch.no_grad()
    def loss(self, steps: Iterable[Step]) -> float:
        """Returns the mean loss of a learned token over all rows, without dropout."""
        total, targets = torch.zeros((), dtype=torch.float64, device=self.model.device), 0
        for step in steps:
            for each in step.passes:
                (losses_N,) = _losses([_Part(self, each, None)])
                total += losses_N.sum(dtype=torch.float64)
            targets += step.targets
        summed, counted = self._ranks.total(total.item(), targets)
        return summed / counted

    def make_room(self, tokens: int) -> None:
        """Has layers computed again for their gradients, from now on, where a pass would not fit into memory else.

        What earlier passes took may still be this process's own: only a larger one can be too large.
        """
        decoder = self.model.language_model
        if tokens > self._largest_pass and not decoder.recompute:
            self._largest_pass = tokens
            kept_bytes, free_bytes = decoder.kept_bytes(tokens), free_memory_bytes(self.plan.device)
            if kept_bytes > _ACTIVATIONS_SHARE * free_bytes:
                decoder.recompute = True
                _log.info("layers are computed twice", tokens=tokens, kept_bytes=kept_bytes, free_bytes=free_bytes)

    def shared_tokens(self) -> int:
        """Most tokens of a pass of several jobs: no more than what needs no layer computed twice for it."""
        decoder = self.model.language_model
        if decoder.recompute:
            return PASS_TOKENS
        room = _ACTIVATIONS_SHARE * free_memory_bytes(self.plan.device) / decoder.kept_bytes(1)
        return min(PASS_TOKENS, max(int(room), self._largest_pass))

    def dropout(self, each: Pass) -> DropoutKey:
        """The key of a pass of the next step."""
        figures = self.state.figures
        return DropoutKey(figures.seed, figures.step * self.plan.rows_per_step + each.first_row)

    def targets(self, step: Step) -> int:
        """The tokens that all ranks learn in a step."""
        (targets,) = self._ranks.total(step.targets)
        return round(targets)

    def forget(self) -> None:
        """Drops the gradients."""
        self.state.optimizer.forget_gradients()

    def move(self, loss_sum: float, targets: int, rate: float) -> None:
        """Takes the step that the gradients say, and forgets them.

        Args:
            loss_sum: of this rank's learned tokens.
            targets: those of all ranks.
            rate: learning rate.

        Raises:
            Refused: NON_FINITE_LOSS; the adapter stays as it was.
        """
        figures = self.state.figures
        self._ranks.add_gradients(self._weights)
        loss = self._ranks.total(loss_sum)[0] / targets
        norm = torch.nn.utils.get_total_norm([tensor.grad for tensor in self._weights if tensor.grad is not None])
        gradient_norm = norm.item()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            self.forget()
            text = f"loss {loss} and gradient norm {gradient_norm} at step {figures.step + 1}: lower the learning rate"
            raise Refused("NON_FINITE_LOSS", text)
        limit = self.plan.spec.optimizer.max_gradient_norm
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(self._weights, limit, norm)
        failpoint("step.gradients")
        self.state.optimizer.step(rate)
        failpoint("step.moved")
        self.forget()
        figures.step += 1
        figures.loss, figures.gradient_norm = loss, gradient_norm


@dataclass(frozen=True, slots=True)
class Turn:
    """What a job brings to a step: the rows, and the learning rate."""

    learner: Learner
    step: Step
    rate: float


def learn_together(turns: Sequence[Turn]) -> list[Exception | None]:
    """Takes one optimiser step of each of several jobs on one base.

    Their rows lie in shared passes, sorted by job: one product with the base over all tokens, one with each adapter
    over its job's own. No token of one job meets a token or a weight of another, so losses, gradients and whatever is
    not finite stay apart. A job's loss is the mean over all learned tokens of its own step, however they are cut into
    passes: accumulated gradients are those of one large batch.

    Returns:
        For each turn why its adapter was not moved; None where it was.

    Raises:
        ValueError: the jobs stand on different bases, or one trains the tower and another does not.
        Exception: a pass cannot be computed; no adapter was moved.
    """
    learners = [turn.learner for turn in turns]
    if any(each.model is not learners[0].model for each in learners):
        raise ValueError("jobs that share a step must share the base")
    if len({each.features is None for each in learners}) > 1:
        raise ValueError("jobs that share a step must all train the tower, or none of them")
    targets = [turn.learner.targets(turn.step) for turn in turns]
    sums = torch.zeros(len(turns), dtype=torch.float64, device=learners[0].model.device)
    for shared in _shared_passes(turns):
        turns[0].learner.make_room(sum(len(each.ids_T) for _, each in shared))
        losses = _losses(
            [_Part(turns[number].learner, each, turns[number].learner.dropout(each)) for number, each in shared]
        )
        torch.autograd.backward(
            [losses_N.sum() / targets[number] for (number, _), losses_N in zip(shared, losses, strict=True)]
        )
        for (number, _), losses_N in zip(shared, losses, strict=True):
            sums[number] += losses_N.detach().sum(dtype=torch.float64)
    problems: list[Exception | None] = []
    for turn, loss_sum, count in zip(turns, sums.tolist(), targets, strict=True):
        try:
            turn.learner.move(loss_sum, count, turn.rate)
            problems.append(None)
        except Exception as problem:
            problems.append(problem)
    return problems


def _shared_passes(turns: Sequence[Turn]) -> Iterator[list[tuple[int, Pass]]]:
    """Passes of jobs in their order, as many together as fit into one, with the number of their turn."""
    limit = turns[0].learner.shared_tokens() if len(turns) > 1 else PASS_TOKENS
    together: list[tuple[int, Pass]] = []
    tokens = 0
    for number, turn in enumerate(turns):
        for each in turn.step.passes:
            if together and tokens + len(each.ids_T) > limit:
                yield together
                together, tokens = [], 0
            together.append((number, each))
            tokens += len(each.ids_T)
    if together:
        yield together


@dataclass(frozen=True, slots=True)
class _Part:
    """One job's rows in a pass; without a key its dropout is off."""

    learner: Learner
    each: Pass
    dropout: DropoutKey | None


def _losses(parts: Sequence[_Part]) -> list[Tensor]:
    """The loss (N,) of every learned token of each part."""
    model = parts[0].learner.model
    passes = [part.each.to(model.device) for part in parts]
    tokens = [len(each.ids_T) for each in passes]
    hidden_T_D = model(
        torch.cat([each.ids_T for each in passes]),
        torch.cat([each.positions_3_T for each in passes], dim=1),
        PackedAttention([length for each in passes for length in each.lengths]),
        _visual(parts),
        _worn(parts, tokens),
    )
    hidden = torch.split(hidden_T_D, tokens)
    wanted_N_D = torch.cat([hidden[number][each.predicting_N] for number, each in enumerate(passes)])
    losses_N = token_losses(model.lm_head, wanted_N_D, torch.cat([each.targets_N for each in passes]))
    return list(torch.split(losses_N, [len(each.targets_N) for each in passes]))


def _visual(parts: Sequence[_Part]) -> VisualFeatures | None:
    first = parts[0].learner
    pictures = [picture for part in parts for picture in part.each.pictures]
    if first.features is None:
        patches = [sum(math.prod(picture.grid) for picture in part.each.pictures) for part in parts]
        return trained_features(first.model, pictures, _worn(parts, patches))
    pieces = [
        visual
        for part in parts
        if part.learner.features is not None and (visual := part.learner.features.of(part.each.pictures)) is not None
    ]
    return VisualFeatures.joined(pieces) if pieces else None


def _worn(parts: Sequence[_Part], sizes: Sequence[int]) -> AdapterBatch:
    """Each part wears its job's adapter over its own tokens or patches."""
    segments, start = [], 0
    for part, size in zip(parts, sizes, strict=True):
        segments.append(Segment(part.learner.state.adapter, start, start + size, part.dropout))
        start += size
    return AdapterBatch(segments)
