"""A model that answers one prompt after another, greedily, whatever computes it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veneer_processing import Encoded
from veneer_trainer.worker.exporting.prompts import Asked
from veneer_vlm.cache import CachedAttention, KeyValueCache
from veneer_vlm.config import ModelConfig
from veneer_vlm.graphs import GraphDecoder, GraphVision, open_session
from veneer_vlm.lora import Adapter, AdapterBatch
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.vision import VisualFeatures


class Answering(Protocol):
    """Reads a prompt, then a token at a time."""

    def start(self, encoded: Encoded, max_tokens: int) -> Tensor:
        """Reads a prompt whose answer has at most so many tokens; the logits (V,) of the first, float32."""
        ...

    def step(self, token: int) -> Tensor:
        """Reads a token; the logits (V,) of the next."""
        ...


class TorchAnswering:
    """Our own forward pass.

    Args:
        model: the base, or a merged model.
        adapter: what all tokens wear.
    """

    def __init__(self, model: VisionLanguageModel, adapter: Adapter | None = None) -> None:
        self._model = model
        self._adapter = adapter
        self._cache: KeyValueCache | None = None
        self._position = 0

    def start(self, encoded: Encoded, max_tokens: int) -> Tensor:
        """See Answering."""
        model, length = self._model, len(encoded.ids_T)
        self._cache = KeyValueCache(model.config.text, 1, length + max_tokens, model.dtype, model.device)
        visual = None
        if len(encoded.grids_n_3):
            patches_P_X = torch.from_numpy(encoded.patches_N_P)
            grids = [(int(t), int(h), int(w)) for t, h, w in encoded.grids_n_3]
            visual = model.see(patches_P_X, grids, AdapterBatch.uniform(self._adapter, len(patches_P_X)))
        self._position = int(encoded.positions_3_T.max()) + 1
        return self._logits(torch.from_numpy(encoded.ids_T), torch.from_numpy(encoded.positions_3_T), visual)

    def step(self, token: int) -> Tensor:
        """See Answering."""
        positions_3_T = torch.full((3, 1), self._position)
        self._position += 1
        return self._logits(torch.tensor([token]), positions_3_T, None)

    def _logits(self, ids_T: Tensor, positions_3_T: Tensor, visual: VisualFeatures | None) -> Tensor:
        assert self._cache is not None  # noqa: S101  # `start` comes first
        attention = CachedAttention(self._cache, [(0, len(ids_T))])
        lora = AdapterBatch.uniform(self._adapter, len(ids_T))
        hidden_T_D = self._model(ids_T, positions_3_T, attention, visual, lora)
        attention.commit()
        logits_V: Tensor = self._model.logits(hidden_T_D[-1:])[0].float()
        return logits_V


class GraphAnswering:
    """Graphs on the runtime that they are for.

    Args:
        directory: that holds them.
        threads: to compute with.

    Raises:
        RefusedError: they cannot be opened.
    """

    def __init__(self, directory: Path, threads: int) -> None:
        config = ModelConfig.from_directory(directory)
        self._vision = GraphVision(open_session(directory, "vision", threads), config.vision)
        self._decoder = GraphDecoder(open_session(directory, "decoder", threads), config)
        text = config.text
        self._empty = np.zeros(
            (text.num_hidden_layers, 1, text.num_key_value_heads, 1, text.head_dim), np.float32
        )  # a token that nobody sees
        self._keys = self._values = self._empty
        self._position = 0

    def start(self, encoded: Encoded, max_tokens: int) -> Tensor:
        """See Answering."""
        assert encoded.patches_N_P is not None  # noqa: S101  # prompts are encoded with their patches
        pieces, first = [], 0
        for t, h, w in encoded.grids_n_3.tolist():
            patches_P_X = torch.from_numpy(encoded.patches_N_P[first : first + t * h * w])
            pieces.append(self._vision.see(patches_P_X, (t, h, w)))
            first += t * h * w
        self._keys = self._values = self._empty
        self._position = int(encoded.positions_3_T.max()) + 1
        visual = VisualFeatures.joined(pieces) if pieces else None
        return self._logits(encoded.ids_T[None], encoded.positions_3_T[:, None], visual)

    def step(self, token: int) -> Tensor:
        """See Answering."""
        positions_3_1_1 = np.full((3, 1, 1), self._position)
        self._position += 1
        return self._logits(np.array([[token]]), positions_3_1_1, None)

    def _logits(
        self, ids_1_T: NDArray[np.int64], positions_3_1_T: NDArray[np.int64], visual: VisualFeatures | None
    ) -> Tensor:
        past, tokens = self._keys.shape[3], ids_1_T.shape[1]
        seen = np.tril(np.ones((tokens, past + tokens), bool), past)[None]
        seen[..., 0] = False
        logits_1_V, keys, values = self._decoder.run(
            ids_1_T, positions_3_1_T, seen, self._keys, self._values, np.array([tokens - 1]), visual
        )
        self._keys = np.concatenate([self._keys, keys], 3)
        self._values = np.concatenate([self._values, values], 3)
        return logits_1_V[0].clone()


@dataclass(slots=True)
class Pace:
    """Tokens and seconds of prompts and of answers."""

    read_tokens: int = 0
    read_s: float = 0.0
    answered_tokens: int = 0
    answered_s: float = 0.0


@torch.inference_mode()
def answer(
    model: Answering, asked: Asked, stop_ids: Collection[int], never: int, pace: Pace
) -> Iterator[tuple[int, Tensor]]:
    """Yields each greedily chosen token with the logits it was chosen by; the one that ends the answer too.

    Args:
        model: who answers.
        asked: the prompt.
        stop_ids: end an answer.
        never: the image token, which no answer has.
        pace: counts what this takes; time that the caller spends between tokens is not counted.
    """
    began_s = time.perf_counter()
    logits_V = model.start(asked.encoded, asked.max_tokens)
    pace.read_s += time.perf_counter() - began_s
    pace.read_tokens += len(asked.encoded.ids_T)
    for number in range(asked.max_tokens):
        logits_V[never] = -torch.inf
        token = int(logits_V.argmax())
        yield token, logits_V
        if token in stop_ids or number + 1 == asked.max_tokens:
            return
        began_s = time.perf_counter()
        logits_V = model.step(token)
        pace.answered_s += time.perf_counter() - began_s
        pace.answered_tokens += 1
