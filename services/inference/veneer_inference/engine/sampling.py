"""The next token of each of several sequences, from their last hidden states.

Owns greedy choice, temperature, top-k, top-p, repetition penalty and log-probabilities. A draw depends on the
request's seed and the token's position alone, never on its neighbours in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer_inference.ports import Sampling, TokenScore
from veneer_vlm.model import VisionLanguageModel

_LIKELY = 256  # of the vocabulary; a nucleus is seldom larger, and sorting all of it takes long


@dataclass(frozen=True, slots=True)
class Wish:
    """How one sequence's next token is chosen.

    Attributes:
        sampling: the request's.
        position: of the token in the sequence.
        seen: ids in prompt and answer; empty where nothing is penalised.
        allowed_V: bool; the ids that may be chosen at all, None for all.
    """

    sampling: Sampling
    position: int
    seen: frozenset[int] | set[int] = frozenset()
    allowed_V: Tensor | None = None

    @property
    def plain(self) -> bool:
        """The likeliest token, and nothing else, is wanted."""
        sampling = self.sampling
        if self.allowed_V is not None:
            return False
        return sampling.temperature == 0 and sampling.logprobs is None and sampling.repetition_penalty == 1


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; its score where that was asked for."""

    token: int
    score: TokenScore | None = None


class Sampler:
    """Chooses tokens; holds the model's head in the form in which the likeliest token is found fastest.

    Never chooses the image token: it stands for a picture that an answer does not have; no pass could go on from it.

    Args:
        model: whose hidden states come.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self._image_token = model.config.image_token_id
        self._distinct: tuple[Tensor, Tensor] | None = None
        distinct = model.lm_head.distinct()
        if distinct is not None:
            # One row for the ids that share it, in the order of the least of them, so that a tie goes to the same id.
            vocabulary = len(distinct.row_V)
            ids_V = torch.arange(vocabulary, device=distinct.row_V.device)
            ids_V[self._image_token] = vocabulary
            first_U = torch.full((len(distinct.weight_U_D),), vocabulary, device=ids_V.device)
            first_U, order_U = first_U.scatter_reduce_(0, distinct.row_V, ids_V, "amin").sort()
            kept = first_U < vocabulary
            self._distinct = distinct.weight_U_D[order_U[kept]], first_U[kept]

    def choose(self, hidden_N_D: Tensor, wishes: Sequence[Wish]) -> list[Choice]:
        """A token for each of N sequences.

        Args:
            hidden_N_D: their last hidden states.
            wishes: how each is chosen.
        """
        plain = [row for row, wish in enumerate(wishes) if wish.plain]
        choices: dict[int, Choice] = {}
        if plain:
            hidden = hidden_N_D if len(plain) == len(wishes) else hidden_N_D[plain]
            choices = {row: Choice(token) for row, token in zip(plain, self._likeliest(hidden), strict=True)}
        others = [row for row in range(len(wishes)) if row not in choices]
        if others:
            logits_N_V = self._model.logits(hidden_N_D[others]).float()
            for row, logits_V in zip(others, logits_N_V, strict=True):
                choices[row] = self._choice(logits_V, wishes[row])
        return [choices[row] for row in range(len(wishes))]

    def _likeliest(self, hidden_N_D: Tensor) -> list[int]:
        if self._distinct is None:
            tokens: list[int] = self._possible(self._model.logits(hidden_N_D)).argmax(-1).tolist()
            return tokens
        weight_U_D, first_U = self._distinct
        tokens = first_U[torch.nn.functional.linear(hidden_N_D, weight_U_D).argmax(-1)].tolist()
        return tokens

    def _possible(self, logits_N_V: Tensor) -> Tensor:
        index = torch.tensor([self._image_token], device=logits_N_V.device)
        return logits_N_V.index_fill(-1, index, -torch.inf)

    def _choice(self, logits_V: Tensor, wish: Wish) -> Choice:
        sampling = wish.sampling
        possible_V = self._possible(logits_V)
        if wish.allowed_V is not None:
            possible_V = possible_V.masked_fill(~wish.allowed_V.to(possible_V.device), -torch.inf)
        if sampling.repetition_penalty != 1:
            possible_V = _penalised(possible_V, wish)
        if sampling.temperature == 0:
            token = int(possible_V.argmax())
        else:
            token = _drawn(possible_V / sampling.temperature, sampling, uniform(sampling.seed, wish.position))
        score = None if sampling.logprobs is None else scores_of(logits_V[None], [token], sampling.logprobs)[0]
        return Choice(token, score)


def scores_of(logits_N_V: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """The log-probability of a token in each row, and the `top` likeliest there."""
    logprobs_N_V = logits_N_V.double().log_softmax(-1)  # a sum over the vocabulary is inexact in float32
    own = logprobs_N_V.gather(-1, torch.tensor(tokens, device=logits_N_V.device)[:, None])[:, 0].tolist()
    values, ids = logprobs_N_V.topk(min(top, logits_N_V.shape[-1]), dim=-1)
    return [
        TokenScore(token, logprob, tuple(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(tokens, own, ids.tolist(), values.tolist(), strict=True)
    ]


def _penalised(logits_V: Tensor, wish: Wish) -> Tensor:
    """Divides what is above zero and multiplies what is below (CTRL, https://arxiv.org/abs/1909.05858)."""
    seen = torch.tensor(sorted(wish.seen), device=logits_V.device)
    values = logits_V[seen]
    penalty = wish.sampling.repetition_penalty
    return logits_V.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def _drawn(logits_V: Tensor, sampling: Sampling, draw: float) -> int:
    """The token at which the summed probability passes `draw`, likeliest first; of the top k, then of the nucleus."""
    logits_V, vocabulary = logits_V.double(), len(logits_V)
    if not sampling.top_k and sampling.top_p >= 1:
        return _place(logits_V.softmax(-1).cumsum(-1), draw)
    if sampling.top_k:
        values, ids = logits_V.topk(min(sampling.top_k, vocabulary))
        sums = values.softmax(-1).cumsum(-1)
    else:
        total = logits_V.logsumexp(-1)
        for size in (min(_LIKELY, vocabulary), vocabulary):
            values, ids = logits_V.topk(size)
            sums = (values - total).exp().cumsum(-1)
            if sums[-1] >= sampling.top_p:
                break
    kept = int((sums < sampling.top_p).sum()) + 1  # the one that reaches top_p included
    return int(ids[_place(sums[:kept], draw)])


def _place(sums: Tensor, draw: float) -> int:
    """The first place whose sum of probabilities is above the share `draw` of all."""
    return min(int(torch.searchsorted(sums, draw * sums[-1], right=True)), len(sums) - 1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone."""
    digest = hashlib.sha256(f"{seed}/{position}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)
