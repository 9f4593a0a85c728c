"""A request inside the engine: its prompt, how far its answer has come, and what it still waits for."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_inference.engine.runner import Item
from veneer_inference.engine.sampling import Wish
from veneer_inference.engine.scheduler import Piece, Sequence
from veneer_inference.ports import EngineError, EnginePrompt, Sampling, TokenScore
from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter
from veneer_vlm.vision import Grid, VisualFeatures

INVALID = "REQUEST_INVALID"


@dataclass(slots=True, eq=False)
class Request:
    """An answer or a score in the making.

    Attributes:
        sequence: the scheduler's view.
        prompt: as it came.
        sampling: how its answer is drawn; None for a score.
        top_logprobs: likeliest tokens at each scored place.
        ids_T: prompt and answer, with room for all of it.
        positions_3_T: likewise.
        visual_before_T: image tokens before each token of the prompt.
        targets: places of the tokens to score.
        adapter: what it wears, once it is admitted.
        features: of each picture, as they come.
        visual: of all, once the last is there.
        scores: so far.
        seen: ids in prompt and answer, where they are penalised.
        arrived_s: on the monotonic clock.
        queued_s: from arrival to admission.
    """

    sequence: Sequence
    prompt: EnginePrompt
    sampling: Sampling | None
    top_logprobs: int
    ids_T: NDArray[np.int64]
    positions_3_T: NDArray[np.int64]
    visual_before_T: NDArray[np.int64]
    targets: list[int]
    adapter: Adapter | None = None
    features: list[VisualFeatures | None] = field(default_factory=list)
    visual: VisualFeatures | None = None
    scores: list[TokenScore] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    arrived_s: float = field(default_factory=time.monotonic)
    queued_s: float = 0.0

    @classmethod
    def of(
        cls, sequence: Sequence, prompt: EnginePrompt, sampling: Sampling | None, top_logprobs: int, image_token: int
    ) -> Request:
        """A request that has just come in; its prompt has been checked."""
        total = sequence.prompt_tokens + sequence.answer_tokens
        ids_T = np.empty(total, np.int64)
        ids_T[: sequence.prompt_tokens] = prompt.ids_T
        positions_3_T = np.empty((3, total), np.int64)
        positions_3_T[:, : sequence.prompt_tokens] = prompt.positions_3_T
        positions_3_T[:, sequence.prompt_tokens :] = np.arange(sequence.prompt_tokens, total) + prompt.rope_delta
        supervised = [] if prompt.supervised_T is None else np.flatnonzero(prompt.supervised_T).tolist()
        return cls(
            sequence,
            prompt,
            sampling,
            top_logprobs,
            ids_T,
            positions_3_T,
            np.concatenate(([0], np.cumsum(prompt.ids_T == image_token))),
            supervised if sampling is None else [],
            features=[None] * len(prompt.grids_n_3),
            seen=set(prompt.ids_T.tolist()) if sampling and sampling.repetition_penalty != 1 else set(),
        )

    def picture(self, index: int) -> tuple[Grid, torch.Tensor]:
        """A picture's grid and its patches."""
        sizes = self.prompt.grids_n_3.prod(1)
        start = int(sizes[:index].sum())
        frames, rows, columns = self.prompt.grids_n_3[index].tolist()
        patches = self.prompt.patches_N_P[start : start + int(sizes[index])]
        return (frames, rows, columns), torch.from_numpy(patches.copy())

    def let_go_of_pixels(self) -> None:
        """The tower has its pictures: while the answer goes on, their pixels need not lie in memory."""
        self.prompt = dataclasses.replace(self.prompt, patches_N_P=np.empty((0, 0), np.float32))

    def saw(self, index: int, features: VisualFeatures) -> None:
        """A picture's features are there; with the last of them the prompt may be computed."""
        self.features[index] = features
        there = [features for features in self.features if features is not None]
        if len(there) == len(self.features):
            self.visual = VisualFeatures.joined(there)
            self.sequence.ready = True

    def item(self, piece: Piece) -> Item:
        """A piece with its tensors."""
        start, stop = piece.start, piece.start + piece.tokens
        visual = None
        if self.visual is not None and start < self.sequence.prompt_tokens:
            first, last = int(self.visual_before_T[start]), int(self.visual_before_T[stop])
            visual = self.visual[first:last] if last > first else None
        return Item(
            self.ids_T[start:stop],
            self.positions_3_T[:, start:stop],
            self.sequence.blocks,
            start,
            self.wanted(piece),
            visual,
            self.adapter,
        )

    def wanted(self, piece: Piece) -> list[int]:
        """The tokens of a piece whose hidden states are needed: those that a scored one follows, or the last."""
        if self.sampling is None:
            return [place - 1 - piece.start for place in self.targets if 0 <= place - 1 - piece.start < piece.tokens]
        return [piece.tokens - 1] if piece.ends else []

    def wish(self, sampling: Sampling) -> Wish:
        """How the next token is chosen."""
        return Wish(sampling, self.sequence.length, self.seen)

    def append(self, token: int, sampling: Sampling) -> str:
        """Takes a new token; why the answer ends with it, or nothing."""
        sequence = self.sequence
        self.ids_T[sequence.length] = token
        sequence.length += 1
        if sampling.repetition_penalty != 1:
            self.seen.add(token)
        if token in sampling.stop_ids:
            return "stop"
        return "length" if sequence.length == sequence.prompt_tokens + sequence.answer_tokens else ""


def check_prompt(prompt: EnginePrompt, model: ModelConfig, *, scored: bool) -> None:
    """Refuses a prompt that the model cannot read, so that no pass fails with others' requests in it.

    Raises:
        EngineError: `REQUEST_INVALID` with everything that is wrong.
    """
    text, vision = model.text, model.vision
    tokens, grids = len(prompt.ids_T), prompt.grids_n_3
    merge = vision.spatial_merge_size
    problems = []
    if not tokens:
        problems.append("it has no tokens")
    elif prompt.ids_T.min() < 0 or prompt.ids_T.max() >= text.vocab_size:
        problems.append(f"token ids from {prompt.ids_T.min()} to {prompt.ids_T.max()}, vocabulary of {text.vocab_size}")
    if prompt.positions_3_T.shape != (3, tokens):
        problems.append(f"positions have shape {prompt.positions_3_T.shape}, (3, {tokens}) is needed")
    if len(grids) and ((grids[:, 0] != 1).any() or (grids[:, 1:] < merge).any() or (grids[:, 1:] % merge).any()):
        problems.append(f"grids {grids.tolist()}: one frame, and multiples of {merge} patches are needed")
    patches = int(grids.prod(1).sum())
    if len(prompt.patches_N_P) != patches or (patches and prompt.patches_N_P.shape[1] != vision.patch_values):
        shape = prompt.patches_N_P.shape
        problems.append(f"patches have shape {shape}, the grids need {(patches, vision.patch_values)}")
    image_tokens = int((prompt.ids_T == model.image_token_id).sum())
    if image_tokens != patches // merge**2:
        problems.append(f"{image_tokens} image tokens, the grids make {patches // merge**2}")
    if prompt.picture_digests and len(prompt.picture_digests) != len(grids):
        problems.append(f"{len(prompt.picture_digests)} picture digests for {len(grids)} pictures")
    if scored:
        supervised = prompt.supervised_T
        if supervised is None or len(supervised) != tokens:
            problems.append(f"{tokens} marks of supervised tokens are needed")
        elif tokens and supervised[0]:
            problems.append("the first token follows nothing and has no score")
    if problems:
        raise EngineError(INVALID, problems)


def check_sampling(sampling: Sampling) -> None:
    """Refuses what no token could be drawn by, so that no pass fails with others' requests in it.

    Raises:
        EngineError: `REQUEST_INVALID` with everything that is wrong.
    """
    checks = {
        f"max_tokens is {sampling.max_tokens}, at least 1 is needed": sampling.max_tokens >= 1,
        f"temperature is {sampling.temperature}, at least 0 is needed": 0 <= sampling.temperature < math.inf,
        f"top_p is {sampling.top_p}, above 0 and at most 1 is needed": 0 < sampling.top_p <= 1,
        f"top_k is {sampling.top_k}, at least 0 is needed": sampling.top_k >= 0,
        f"repetition_penalty is {sampling.repetition_penalty}, above 0 is needed": (
            0 < sampling.repetition_penalty < math.inf
        ),
        f"logprobs is {sampling.logprobs}, at least 0 is needed": sampling.logprobs is None or sampling.logprobs >= 0,
    }
    problems = [problem for problem, holds in checks.items() if not holds]
    if problems:
        raise EngineError(INVALID, problems)
