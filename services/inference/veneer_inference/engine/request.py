"""A request inside the engine: its prompt, how far its answer has come, and what it still waits for."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from veneer_inference.engine.drafts import NGRAM, Continuations
from veneer_inference.engine.grammar import Grammar
from veneer_inference.engine.prefix import BlockKeys
from veneer_inference.engine.runner import Item
from veneer_inference.engine.sampling import Wish
from veneer_inference.engine.scheduler import Piece, Sequence
from veneer_inference.ports import EngineError, EnginePrompt, Sampling, TokenScore
from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter
from veneer_vlm.vision import Grid, VisualFeatures

INVALID = "REQUEST_INVALID"
_FIRST_GUESSES, _MOST_GUESSES = 4, 8


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
        visual_before_T: image tokens before each token of the prompt, and in all of it.
        image_ends_n: image tokens up to the end of each picture.
        targets: places of the tokens to score.
        adapter: what it wears, once it is admitted.
        features: of each picture that is to be seen, as they come.
        visual: of all those, once the last is there.
        unseen: image tokens of the pictures before them, which are in the cached beginning.
        keys: names of its blocks; None where none may be shared.
        grammar: what its answer is held to; None for free text.
        said: its own tokens, to guess by; None where nothing is guessed.
        guesses: how many tokens it guesses next.
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
    image_ends_n: NDArray[np.int64]
    targets: list[int]
    adapter: Adapter | None = None
    features: dict[int, VisualFeatures | None] = field(default_factory=dict)
    visual: VisualFeatures | None = None
    unseen: int = 0
    keys: BlockKeys | None = None
    grammar: Grammar | None = None
    said: Continuations | None = None
    guesses: int = _FIRST_GUESSES
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
        visual_before_T = np.concatenate(([0], np.cumsum(prompt.ids_T == image_token)))
        patches_n = np.cumsum(prompt.grids_n_3.prod(1))
        return cls(
            sequence,
            prompt,
            sampling,
            top_logprobs,
            ids_T,
            positions_3_T,
            visual_before_T,
            patches_n * visual_before_T[-1] // max(len(prompt.patches_N_P), 1),
            supervised if sampling is None else [],
            seen=set(prompt.ids_T.tolist()) if sampling and sampling.repetition_penalty != 1 else set(),
        )

    def share(self, block_tokens: int) -> None:
        """Lets the request's blocks be shared, and its prompt begin with others'; not where a picture has no digest."""
        digests, sequence = self.prompt.picture_digests, self.sequence
        if len(digests) != len(self.image_ends_n):
            return
        image_places = np.flatnonzero(np.diff(self.visual_before_T)).tolist()
        begins = [0, *self.image_ends_n[:-1].tolist()]
        pictures = [
            (image_places[begin], digest, tuple(grid))
            for begin, digest, grid in zip(begins, digests, self.prompt.grids_n_3.tolist(), strict=False)
        ]
        self.keys = BlockKeys(sequence.tenant, sequence.adapter, block_tokens, pictures)
        sequence.sharable = min(self.targets, default=sequence.prompt_tokens) - 1
        self.name_blocks()

    def name_blocks(self) -> None:
        """Names the blocks that the tokens known so far fill."""
        if self.keys is not None:
            self.sequence.keys = self.keys.upto(self.sequence.length, self.ids_T, self.positions_3_T)

    def to_see(self) -> list[int]:
        """The pictures that the tower must see: those that do not lie within the cached beginning."""
        cached = int(self.visual_before_T[self.sequence.cached])
        first = int(np.searchsorted(self.image_ends_n, cached, side="right"))
        indices = list(range(first, len(self.image_ends_n)))
        self.unseen = int(self.image_ends_n[first - 1]) if first else 0
        self.features = dict.fromkeys(indices)
        self.sequence.ready = not indices
        return indices

    def speculate(self) -> None:
        """Lets the answer guess ahead, unless how a token is chosen depends on the one before it."""
        sampling = self.sampling
        if sampling is not None and self.grammar is None and sampling.repetition_penalty == 1:
            self.said = Continuations()
            self.said.add(self.prompt.ids_T.tolist())

    def guess(self, most: int, others: Continuations | None, image_token: int) -> None:
        """Guesses the next tokens: as the sequence itself went on, else as `others` did. Never an image token."""
        sequence = self.sequence
        sequence.draft = 0
        most = min(most, self.guesses, sequence.prompt_tokens + sequence.answer_tokens - sequence.length - 1)
        if self.said is None or most <= 0:
            return
        last = self.ids_T[max(0, sequence.length - NGRAM) : sequence.length].tolist()
        found = self.said.after(last, most) or ([] if others is None else others.after(last, most))
        if image_token in found:
            found = found[: found.index(image_token)]
        sequence.draft = len(found)
        self.ids_T[sequence.length : sequence.length + len(found)] = found

    def checked(self, drafted: int, kept: int) -> None:
        """So many of the guesses were right: guesses grow where they all are, and shrink where none is."""
        if drafted and kept == drafted:
            self.guesses = min(2 * self.guesses, _MOST_GUESSES)
        elif drafted and not kept:
            self.guesses = max(1, self.guesses // 2)

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
        there = [features for features in self.features.values() if features is not None]
        if len(there) == len(self.features):
            self.visual = VisualFeatures.joined(there)
            self.sequence.ready = True

    def item(self, piece: Piece) -> Item:
        """A piece with its tensors."""
        start, stop = piece.start, piece.start + piece.tokens
        visual = None
        if self.visual is not None and start < self.sequence.prompt_tokens:
            first, last = (int(self.visual_before_T[place]) - self.unseen for place in (start, stop))
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
        return list(range(piece.tokens - 1 - self.sequence.draft, piece.tokens)) if piece.ends else []

    def wishes(self, sampling: Sampling) -> list[Wish]:
        """How the next token is chosen, and one after each guess; raises EngineError where its grammar cannot go on."""
        allowed_V = None if self.grammar is None else torch.from_numpy(self.grammar.allowed())
        first = self.sequence.length
        return [Wish(sampling, first + ahead, self.seen, allowed_V) for ahead in range(1 + self.sequence.draft)]

    def append(self, token: int, sampling: Sampling) -> str:
        """Takes a new token; why the answer ends with it, or nothing. Raises EngineError as `wishes`."""
        sequence = self.sequence
        self.ids_T[sequence.length] = token
        sequence.length += 1
        if sampling.repetition_penalty != 1:
            self.seen.add(token)
        if self.said is not None:
            self.said.add([token])
        if self.grammar is not None:
            self.grammar.take(token)
        if token in sampling.stop_ids or (self.grammar is not None and self.grammar.complete):
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
