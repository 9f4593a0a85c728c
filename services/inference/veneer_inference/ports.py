"""What the service asks of an engine: types without torch and without gRPC.

An engine holds one base and any number of adapters, named by digest. Requests come tokenised; tokens go out, a list
a step. Text (stop strings, characters that span tokens) is the service's part.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        max_tokens: tokens at most, the ending one included.
        temperature: 0 is greedy.
        top_p: draws from the likeliest tokens whose probabilities sum to this; 1 is all.
        top_k: draws from so many likeliest tokens; 0 is all.
        repetition_penalty: of tokens in the prompt or the answer; 1 is none.
        seed: of the draws; the same request with the same seed answers the same in any batch.
        logprobs: likeliest tokens to report with each token's log-probability; None for no log-probabilities.
        stop_ids: ends the answer; the token is reported.
        json_schema: the answer is JSON of this schema; empty for free text.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int | None = None
    stop_ids: tuple[int, ...] = ()
    json_schema: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class EnginePrompt:
    """A prompt as the model reads it: T tokens, n pictures, N patches of P values.

    Attributes:
        ids_T: int64 token ids.
        positions_3_T: int64 rotary positions.
        rope_delta: token T+k stands at T + k + rope_delta.
        grids_n_3: int64 grid of each picture.
        patches_N_P: float32 patches of all pictures, in order.
        picture_digests: SHA-256 of each picture as it came, hex; a part of cache keys.
        supervised_T: bool; tokens to score, as targets. None for a prompt to answer.
    """

    ids_T: NDArray[np.int64]
    positions_3_T: NDArray[np.int64]
    rope_delta: int
    grids_n_3: NDArray[np.int64]
    patches_N_P: NDArray[np.float32]
    picture_digests: tuple[str, ...] = ()
    supervised_T: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's natural log-probability before temperature and penalties, with the likeliest at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the engine brought for one request.

    Attributes:
        token_ids: new tokens, in order; empty only in a step that ends the answer without one.
        scores: of those tokens, when they were asked for.
        finish: "" while the answer goes on; "stop" after one of `stop_ids`; "length" at `max_tokens` or the context.
        cached_tokens: tokens of the prompt that came from the prefix cache.
        queued_s: seconds from arrival at the engine to admission.
    """

    token_ids: tuple[int, ...]
    scores: tuple[TokenScore, ...] = ()
    finish: str = ""
    cached_tokens: int = 0
    queued_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is; fixed from its start.

    Attributes:
        model_digest: of the base that was read, computed from its tensors.
        dtype: "float32", "bfloat16" or "int8".
        device: "cpu" or "cuda".
        engine: its own name.
        context_length: longest sequence in tokens, prompt and answer together.
        kv_capacity_tokens: tokens of key-value memory over all requests.
        adapter_slots: adapters that are ready for a step at once.
        max_rank: greatest rank of an adapter.
    """

    model_digest: str
    dtype: str
    device: str
    engine: str
    context_length: int
    kv_capacity_tokens: int
    adapter_slots: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class AdapterState:
    """An adapter in the engine.

    Attributes:
        digest: which.
        in_slot: ready for the next step; else in host memory.
        active_requests: requests that use it now, waiting ones included.
        size_bytes: of its tensors.
    """

    digest: str
    in_slot: bool
    active_requests: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of the moment."""

    waiting: int = 0
    running: int = 0
    kv_tokens_in_use: int = 0
    steps: int = 0
    adapters: tuple[AdapterState, ...] = ()
    counters: dict[str, int] = field(default_factory=dict)


class EngineError(Exception):
    """The engine cannot do what was asked; `retry_s` is set where trying again later may help.

    Attributes:
        reason: UPPER_SNAKE: `ADAPTER_INVALID`, `ADAPTER_NOT_LOADED`, `QUEUE_FULL`, `TOO_LONG`, `ENGINE_GONE`,
            `READER_TOO_SLOW`, `REQUEST_INVALID`, `SCHEMA_UNSUPPORTED`.
        problems: one line for each thing that is wrong.
        retry_s: seconds after which to try again; None where it would not help.
    """

    def __init__(self, reason: str, problems: Sequence[str], retry_s: float | None = None) -> None:
        super().__init__("; ".join(problems))
        self.reason = reason
        self.problems = tuple(problems)
        self.retry_s = retry_s


class Engine(Protocol):
    """An engine, seen from the service's event loop. All methods may raise EngineError."""

    @property
    def info(self) -> EngineInfo:
        """What it is; known once it has started."""

    async def load_adapter(self, digest: str, directory: Path) -> int:
        """Reads and checks a PEFT folder off the step, and holds it under its digest; returns bytes of its tensors.

        Loading what is loaded does nothing; calls at once for one digest share one load. What is wrong with the
        folder (keys, shapes, rank, not finite, tensors that do not hash to `digest`) raises `ADAPTER_INVALID`.
        """

    async def unload_adapter(self, digest: str) -> None:
        """Drops an adapter once no request uses it; later requests need `load_adapter` again."""

    def generate(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, sampling: Sampling
    ) -> AsyncIterator[Step]:
        """Answers; closing the iterator cancels, and frees what the request held within one step.

        `adapter_digest` is empty for the base alone, and must be loaded: `ADAPTER_NOT_LOADED`. The adapter is held
        from here to the last step. A reader that falls more than a bounded number of steps behind: `READER_TOO_SLOW`.
        """

    async def score(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, top_logprobs: int
    ) -> tuple[TokenScore, ...]:
        """Log-probabilities of the supervised tokens, in order."""

    def stats(self) -> EngineStats:
        """The figures of the last step; never waits."""

    async def gone(self) -> None:
        """Returns when the engine has died; the service then stops being SERVING and starts another."""

    async def close(self) -> None:
        """Ends the engine and its process; requests in flight fail with `ENGINE_GONE`."""
