"""vLLM behind the engine's port, for fleets of GPUs. Written against its documented interface; see docs/inference.md.

vLLM owns batching, memory and the slots of adapters. Owned here: what it does not check (an adapter's digest, base and
shape), what it does not bound (requests that wait), and how a prompt of ours becomes one of its own. Pictures go as
they were resized under the adapter's contract, so that vLLM's own resize finds nothing to do; its caches are salted
by tenant.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from veneer_digests import model_digest
from veneer_inference.engine.adapter_folder import read_adapter
from veneer_inference.engine.pace import Pace
from veneer_inference.engine.sight import touches_tower
from veneer_inference.ports import (
    AdapterState,
    EngineError,
    EngineInfo,
    EnginePrompt,
    EngineStats,
    Sampling,
    Step,
    TokenScore,
)
from veneer_rpc.threads import in_thread
from veneer_vlm.config import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

NAME = "vllm"
_HEALTH_S = 1.0
_NO_BOUND = {"shortest_edge": 1, "longest_edge": 1 << 40}  # pixels: the picture has its size already
_PIXEL_MEAN = _PIXEL_STD = 0.5  # of Qwen3-VL's processor, each channel
_MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Library:
    """What is used of vLLM, so that a test can stand in for it."""

    AsyncEngineArgs: Any
    AsyncLLMEngine: Any
    SamplingParams: Any
    RequestOutputKind: Any
    StructuredOutputsParams: Any
    LoRARequest: Any

    @classmethod
    def installed(cls) -> Library:
        """The one that is installed.

        Raises:
            EngineError: there is none.
        """
        try:
            top, sampling, lora = (
                importlib.import_module(name) for name in ("vllm", "vllm.sampling_params", "vllm.lora.request")
            )
        except ImportError as error:
            problem = f"vLLM is not installed ({error}): pip install vllm, or start with --engine torch"
            raise EngineError("ENGINE_GONE", [problem]) from error
        return cls(
            top.AsyncEngineArgs, top.AsyncLLMEngine, top.SamplingParams, sampling.RequestOutputKind,
            sampling.StructuredOutputsParams, lora.LoRARequest,
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Held:
    """An adapter that vLLM may load from its folder whenever it needs it."""

    request: Any
    size_bytes: int
    active: int = 0
    retired: bool = False


class VllmEngine:
    """See ports.Engine. Made by `start`."""

    def __init__(
        self,
        library: Library,
        engine: Any,  # noqa: ANN401
        model: ModelConfig,
        info: EngineInfo,
        max_requests: int,
    ) -> None:
        self._library = library
        self._engine = engine
        self._model = model
        self._info = info
        self._max_requests = max_requests
        self._held: dict[str, _Held] = {}
        self._loads: dict[str, asyncio.Task[int]] = {}
        self._numbers = itertools.count(1)
        self._requests = 0
        self._running = 0
        self._counters: Counter[str] = Counter()
        self._pace = Pace()
        self._closed = asyncio.Event()

    @classmethod
    async def start(
        cls,
        model_directory: Path,
        *,
        dtype: str,
        slots: int,
        max_rank: int,
        max_requests: int,
        context_length: int | None = None,
        library: Library | None = None,
    ) -> VllmEngine:
        """Starts an engine, and returns when it has its base.

        Args:
            model_directory: of the base.
            dtype: "bfloat16" or "float32".
            slots: adapters in one batch.
            max_rank: greatest rank of an adapter.
            max_requests: running and waiting at once; more are refused.
            context_length: longest sequence; the model's own where it is not given.
            library: stands in for vLLM.

        Raises:
            EngineError: `ENGINE_GONE`: vLLM is not installed, or cannot start with this base.
        """
        library = library or Library.installed()
        model = ModelConfig.from_directory(model_directory)
        digest = await in_thread(model_digest, model_directory)
        arguments = library.AsyncEngineArgs(
            model=str(model_directory), dtype=dtype, enable_lora=True, max_loras=slots, max_lora_rank=max_rank,
            max_model_len=context_length, enable_prefix_caching=True, max_logprobs=_MAX_LOGPROBS,
            trust_remote_code=False, disable_log_stats=True,
        )  # fmt: skip
        try:
            engine = await in_thread(library.AsyncLLMEngine.from_engine_args, arguments)
        except Exception as error:  # whatever vLLM raises, this base cannot be served
            raise EngineError("ENGINE_GONE", [f"vLLM cannot start: {error}"]) from error
        cache = engine.vllm_config.cache_config
        info = EngineInfo(
            model_digest=digest,
            dtype=dtype,
            device="cuda",
            engine=NAME,
            context_length=engine.model_config.max_model_len,
            kv_capacity_tokens=cache.num_gpu_blocks * cache.block_size,
            adapter_slots=slots,
            max_rank=max_rank,
        )
        return cls(library, engine, model, info, max_requests)

    @property
    def info(self) -> EngineInfo:
        """See ports.Engine."""
        return self._info

    async def load_adapter(self, digest: str, directory: Path) -> int:
        """See ports.Engine. vLLM serves adapters on the decoder alone: others are `ADAPTER_INVALID`."""
        held = self._held.get(digest)
        if held is not None:
            held.retired = False
            return held.size_bytes
        task = self._loads.get(digest)
        if task is None:
            task = self._loads[digest] = asyncio.create_task(self._load(digest, directory))
            task.add_done_callback(lambda _: self._loads.pop(digest, None))
        return await asyncio.shield(task)

    async def unload_adapter(self, digest: str) -> None:
        """See ports.Engine."""
        held = self._held.get(digest)
        if held is not None:
            held.retired = True
            await self._drop_unused(digest)

    async def generate(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, sampling: Sampling
    ) -> AsyncIterator[Step]:
        """See ports.Engine. vLLM joins the steps of a slow reader, so that none falls behind."""
        params = self._library.SamplingParams(
            max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
            top_k=sampling.top_k, repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed if sampling.temperature > 0 else None, logprobs=sampling.logprobs,
            stop_token_ids=list(sampling.stop_ids), ignore_eos=True, detokenize=False,
            output_kind=self._library.RequestOutputKind.DELTA,
            structured_outputs=self._structured(sampling.json_schema),
        )  # fmt: skip
        arrived_s, queued_s = time.monotonic(), 0.0
        outputs = self._outputs(tenant, adapter_digest, prompt, params)
        try:
            async for output in outputs:
                queued_s = queued_s or time.monotonic() - arrived_s
                (answer,) = output.outputs
                self._counters["answer_tokens"] += len(answer.token_ids)
                scores = tuple(
                    _score(token, found, sampling.logprobs or 0)
                    for token, found in zip(answer.token_ids, answer.logprobs or (), strict=False)
                )
                finish = answer.finish_reason or ""
                if finish not in ("", "stop", "length"):
                    raise EngineError("ENGINE_GONE", [f"vLLM ended the answer by itself: {finish}"])
                yield Step(tuple(answer.token_ids), scores, finish, output.num_cached_tokens or 0, queued_s)
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]  # it is a generator

    async def score(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, top_logprobs: int
    ) -> tuple[TokenScore, ...]:
        """See ports.Engine."""
        params = self._library.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=top_logprobs, detokenize=False,
            output_kind=self._library.RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        found: Sequence[Mapping[int, Any] | None] = ()
        async for output in self._outputs(tenant, adapter_digest, prompt, params):
            found = output.prompt_logprobs or found
        if len(found) != len(prompt.ids_T):
            problem = f"vLLM scored {len(found)} tokens of a prompt of {len(prompt.ids_T)}"
            raise EngineError("ENGINE_FAILED", [problem])
        supervised = [] if prompt.supervised_T is None else np.flatnonzero(prompt.supervised_T).tolist()
        return tuple(_score(int(prompt.ids_T[place]), found[place] or {}, top_logprobs) for place in supervised)

    def stats(self) -> EngineStats:
        """See ports.Engine. Which adapters are in a slot vLLM does not tell: those in use are."""
        adapters = tuple(
            AdapterState(digest, held.active > 0, held.active, held.size_bytes) for digest, held in self._held.items()
        )
        return EngineStats(
            waiting=self._requests - self._running, running=self._running, adapters=adapters,
            counters=dict(self._counters),
        )  # fmt: skip

    async def gone(self) -> None:
        """See ports.Engine."""
        while not self._engine.errored and not self._closed.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_S):
                    await self._closed.wait()

    async def close(self) -> None:
        """See ports.Engine."""
        if not self._closed.is_set():
            self._closed.set()
            await in_thread(self._engine.shutdown)

    async def _load(self, digest: str, directory: Path) -> int:
        adapter = await in_thread(
            read_adapter, directory, digest, self._model, self._info.model_digest, self._info.max_rank, torch.bfloat16
        )
        if touches_tower(adapter):
            raise EngineError("ADAPTER_INVALID", ["it adapts the vision tower, which vLLM does not serve"])
        size_bytes = sum(tensor.nbytes for _, tensor in adapter.tensors())
        request = self._library.LoRARequest(digest, next(self._numbers), str(directory))
        with self._told():
            if not await self._engine.add_lora(request):
                raise EngineError("ADAPTER_INVALID", ["vLLM refuses it"])
        self._held[digest] = _Held(request, size_bytes)
        self._counters["adapters_loaded"] += 1
        return size_bytes

    async def _outputs(
        self,
        tenant: str,
        adapter_digest: str,
        prompt: EnginePrompt,
        params: Any,  # noqa: ANN401
    ) -> AsyncIterator[Any]:
        """What vLLM says of one request, from here to its end counted and held."""
        held = self._held.get(adapter_digest)
        if adapter_digest and (held is None or held.retired):
            raise EngineError("ADAPTER_NOT_LOADED", [f"adapter {adapter_digest} is not loaded"])
        if self._requests >= self._max_requests:
            problem = f"{self._requests} requests run and wait, {self._max_requests} may"
            raise EngineError("QUEUE_FULL", [problem], self._pace.wait_s(1))
        self._requests += 1
        self._counters["requests"] += 1
        if held is not None:
            held.active += 1
        begun = ended = False
        outputs = None
        try:
            asked = await in_thread(self._prompt, tenant, prompt)
            outputs = self._engine.generate(
                asked, params, f"{NAME}-{next(self._numbers)}", lora_request=held.request if held else None
            )
            with self._told():
                async for output in outputs:
                    self._running += not begun
                    begun = True
                    yield output
            ended = True
        finally:
            self._requests -= 1
            self._running -= begun
            self._counters["cancelled"] += not ended
            self._pace.ended(time.monotonic(), more=self._requests > 0)
            if outputs is not None:
                await outputs.aclose()  # vLLM aborts a request whose reader has left
            if held is not None:
                held.active -= 1
                await self._drop_unused(adapter_digest)

    async def _drop_unused(self, digest: str) -> None:
        held = self._held.get(digest)
        if held is not None and held.retired and not held.active:
            del self._held[digest]
            with self._told():
                await self._engine.remove_lora(held.request.lora_int_id)

    def _prompt(self, tenant: str, prompt: EnginePrompt) -> dict[str, Any]:
        vision = self._model.vision
        lengths = [int(each) // vision.spatial_merge_size**2 for each in prompt.grids_n_3.prod(1)]
        asked: dict[str, Any] = {
            "prompt_token_ids": collapsed(prompt.ids_T, self._model.image_token_id, lengths),
            "cache_salt": tenant,
        }
        if lengths:
            asked["multi_modal_data"] = {"image": pictures(prompt, vision.patch_size, vision.spatial_merge_size)}
            asked["mm_processor_kwargs"] = {"size": _NO_BOUND}
            if prompt.picture_digests:
                grids = ("x".join(map(str, grid)) for grid in prompt.grids_n_3.tolist())
                names = [
                    f"{tenant}:{digest}:{grid}" for digest, grid in zip(prompt.picture_digests, grids, strict=True)
                ]
                asked["multi_modal_uuids"] = {"image": names}
        return asked

    def _structured(self, json_schema: str) -> Any:  # noqa: ANN401  # vLLM's own
        return self._library.StructuredOutputsParams(json=json_schema) if json_schema else None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what vLLM raises into the port's error."""
        try:
            yield
        except EngineError:
            raise
        except ValueError as error:  # vLLM's errors about a request are of this kind
            raise EngineError("REQUEST_INVALID", [str(error)]) from error
        except Exception as error:
            raise EngineError("ENGINE_GONE", [f"vLLM: {error}"]) from error


def collapsed(ids_T: NDArray[np.int64], image_token: int, lengths: Sequence[int]) -> list[int]:
    """Token ids with one image token for each picture, as vLLM takes them.

    Args:
        ids_T: with as many image tokens as a picture has visual tokens.
        image_token: its id.
        lengths: visual tokens of each picture.
    """
    places, kept, start = np.flatnonzero(ids_T == image_token), np.ones(len(ids_T), np.bool_), 0
    for length in lengths:
        kept[places[start + 1 : start + length]] = False
        start += length
    return [int(each) for each in ids_T[kept]]


def pictures(prompt: EnginePrompt, patch: int, merge: int) -> list[Image.Image]:
    """The pictures that a prompt's patches were cut from, at the size the model sees.

    Args:
        prompt: with its patches.
        patch: edge of a patch, in pixels.
        merge: patches along each edge that merge into one visual token.
    """
    found, start = [], 0
    for _, rows, columns in prompt.grids_n_3.tolist():
        patches = prompt.patches_N_P[start : start + rows * columns]
        start += rows * columns
        frames = patches.reshape(rows // merge, columns // merge, merge, merge, 3, -1, patch, patch)[:, :, :, :, :, 0]
        pixels = frames.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
        levels = np.rint((pixels * _PIXEL_STD + _PIXEL_MEAN) * 255).clip(0, 255)
        found.append(Image.fromarray(levels.astype(np.uint8)))
    return found


def _score(token: int, found: Mapping[int, Any], top: int) -> TokenScore:
    """A token's score among vLLM's, which holds it and the likeliest."""
    ordered = sorted(((each.rank, number, each.logprob) for number, each in found.items()), key=lambda each: each[0])
    likeliest = tuple((number, logprob) for _, number, logprob in ordered[:top])
    return TokenScore(token, found[token].logprob, likeliest)
