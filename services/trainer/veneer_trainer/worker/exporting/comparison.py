"""Whether an exported model answers as the adapter does.

The adapter on its base, in float32, answers first; what it chose is kept, with the logits of each answer's first tokens
on disk. Then the exported model answers the same prompts. Two answers are equal when their tokens are, or when they
first part at a token where the adapter's own logits of the two choices differ by no more than float32 allows (a tie:
`veneer_vlm.verify` has the bound). One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from veneer_processing import Processor
from veneer_trainer.worker import metrics
from veneer_trainer.worker.exporting.answering import Answering, Pace, answer
from veneer_trainer.worker.exporting.prompts import Asked
from veneer_vlm.verify import FLOAT32_LIMIT

FULL_TOKENS = 8  # of each answer, whose logits are all compared
POINT = 0.01  # of a metric, that a lossy form may lose
_NEAR = 16  # likeliest tokens that are kept of every other token of an answer


@dataclass(slots=True)
class Reference:
    """What the adapter answered.

    Attributes:
        tokens: of each answer, the one that ends it too.
        near: for each of them the logits of the likeliest tokens, by id.
        logits: of the first tokens of all answers, one row each, on disk.
        greatest: the greatest magnitude of a logit.
        pace: how fast.
    """

    tokens: list[list[int]] = field(default_factory=list)
    near: list[list[dict[int, float]]] = field(default_factory=list)
    logits: np.memmap[Any, np.dtype[np.float32]] | None = None
    greatest: float = 0.0
    pace: Pace = field(default_factory=Pace)

    @property
    def limit(self) -> float:
        """How far two float32 computations of one logit may lie apart."""
        return FLOAT32_LIMIT * max(1.0, self.greatest / 10)


@dataclass(slots=True)
class Found:
    """How an exported model did beside the adapter."""

    texts: list[str] = field(default_factory=list)
    identical: int = 0
    ties: int = 0
    compared: int = 0
    difference: float = 0.0
    pace: Pace = field(default_factory=Pace)


class Comparison:
    """Asks both.

    Args:
        asked: the prompts.
        processor: says what ends an answer, and turns ids to text.
        stop_ids: end an answer.
        never: the image token.
        folder: for the logits.
        tell: hears how many prompts have been answered, of either.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        processor: Processor,
        stop_ids: Collection[int],
        never: int,
        folder: Path,
        tell: Callable[[int], None],
    ) -> None:
        self._asked = asked
        self._processor = processor
        self._stop_ids = stop_ids
        self._never = never
        self._folder = folder
        self._tell = tell

    def reference(self, model: Answering) -> Reference:
        """Has the adapter answer."""
        reference = Reference()
        for index, asked in enumerate(self._asked):
            tokens: list[int] = []
            near = []
            for token, logits_V in answer(model, asked, self._stop_ids, self._never, reference.pace):
                if reference.logits is None:
                    shape = (len(self._asked) * FULL_TOKENS, len(logits_V))
                    reference.logits = np.memmap(self._folder / "logits.f32", np.float32, "w+", shape=shape)
                if len(tokens) < FULL_TOKENS:
                    reference.logits[index * FULL_TOKENS + len(tokens)] = logits_V.numpy()
                    finite_V = logits_V[logits_V.isfinite()]
                    reference.greatest = max(reference.greatest, finite_V.abs().max().item())
                values, ids = logits_V.topk(min(_NEAR, len(logits_V)))
                near.append(dict(zip(ids.tolist(), values.tolist(), strict=True)))
                tokens.append(token)
            reference.tokens.append(tokens)
            reference.near.append(near)
            self._tell(index + 1)
        return reference

    def export(self, model: Answering, reference: Reference) -> Found:
        """Has the exported model answer."""
        found = Found()
        for index, asked in enumerate(self._asked):
            expected, tokens = reference.tokens[index], list[int]()
            for token, logits_V in answer(model, asked, self._stop_ids, self._never, found.pace):
                place = len(tokens)
                together = tokens == expected[:place] and place < len(expected)
                if together and place < FULL_TOKENS and reference.logits is not None:
                    row_V = torch.from_numpy(np.array(reference.logits[index * FULL_TOKENS + place]))
                    difference_V = (logits_V - row_V)[torch.arange(len(row_V)) != self._never]
                    found.difference = max(found.difference, difference_V.abs().max().item())
                    found.compared += 1
                tokens.append(token)
            found.identical += tokens == expected
            found.ties += tokens != expected and self._tied(reference, index, tokens)
            found.texts.append(self._text(tokens))
            self._tell(index + 1)
        return found

    def report(self, reference: Reference, found: Found) -> dict[str, Any]:
        """What the certificate says was measured."""
        texts = [self._text(tokens) for tokens in reference.tokens]
        return {
            "prompts": len(self._asked),
            "answers_identical": found.identical,
            "answers_within_tie": found.ties,
            "tie_limit": reference.limit,
            "greatest_logit_difference": found.difference,
            "logits_compared": found.compared,
            "metrics": self._metrics(texts, found.texts),
            "tokens_per_second": {"adapter": _rate(reference.pace), "export": _rate(found.pace)},
            "prompt_tokens_per_second": {
                "adapter": round(reference.pace.read_tokens / max(reference.pace.read_s, 1e-9), 1),
                "export": round(found.pace.read_tokens / max(found.pace.read_s, 1e-9), 1),
            },
        }

    def _metrics(self, adapter: Sequence[str], export: Sequence[str]) -> dict[str, dict[str, float]]:
        rows = [
            (asked.expected, *answers)
            for asked, answers in zip(self._asked, zip(adapter, export, strict=True), strict=True)
            if asked.expected is not None
        ]
        has_fields = any(metrics.fields_of(expected) for expected, _, _ in rows)
        wanted = [metrics.EXACT, metrics.FIELDS] if has_fields else [metrics.EXACT]
        tallies = {"adapter": metrics.Tally(), "export": metrics.Tally()}
        for expected, of_adapter, of_export in rows:
            tallies["adapter"].add(metrics.scores(expected, of_adapter, wanted))
            tallies["export"].add(metrics.scores(expected, of_export, wanted))
        figures: dict[str, dict[str, float]] = {}
        for who, tally in tallies.items():
            for figure in tally.metrics():
                if figure.metric in wanted:
                    figures.setdefault(figure.metric, {})[who] = figure.value
        return figures

    def _tied(self, reference: Reference, index: int, tokens: Sequence[int]) -> bool:
        expected, near = reference.tokens[index], reference.near[index]
        place = next(
            (place for place, pair in enumerate(zip(expected, tokens, strict=False)) if pair[0] != pair[1]), None
        )
        if place is None:
            return False
        other = near[place].get(tokens[place])
        return other is not None and near[place][expected[place]] - other <= 2 * reference.limit

    def _text(self, tokens: Sequence[int]) -> str:
        return self._processor.decode([token for token in tokens if token not in self._stop_ids])


def inequalities(measured: dict[str, Any]) -> list[str]:
    """What forbids to call an export the same model in float32."""
    problems = []
    equal = measured["answers_identical"] + measured["answers_within_tie"]
    if equal < measured["prompts"]:
        problems.append(f"{measured['prompts'] - equal} of {measured['prompts']} answers differ from the adapter's")
    if measured["greatest_logit_difference"] > measured["tie_limit"]:
        found, limit = measured["greatest_logit_difference"], measured["tie_limit"]
        problems.append(f"a logit differs by {found:.2g}, the limit is {limit:.2g}")
    return problems


def losses(measured: dict[str, Any]) -> list[str]:
    """Metrics that fall by more than a point."""
    return [
        f"{metric} is {figures['export']:.4f}, the adapter's {figures['adapter']:.4f}"
        for metric, figures in measured["metrics"].items()
        if figures["adapter"] - figures["export"] > POINT + 1e-9
    ]


def _rate(pace: Pace) -> float:
    return round(pace.answered_tokens / max(pace.answered_s, 1e-9), 1)
