"""The base that answers: a living engine with what turns conversations into its tokens and back.

Owns the engine's life: the first token before the service is SERVING, and another engine when one dies.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import structlog

from veneer_inference.domain.token_bytes import TokenBytes
from veneer_inference.ports import Engine, EnginePrompt, Sampling
from veneer_processing import Conversation, Encoded, Message, ProcessingContract, Processor, Text
from veneer_rpc.errors import Unavailable
from veneer_rpc.names import ModelName
from veneer_rpc.threads import in_thread

_CHECK_TENANT = "self-check"
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 30.0
_RETRY_S = 2.0
_GENERATION_CONFIG = "generation_config.json"
_log = structlog.get_logger(__name__)

_T = TypeVar("_T")
StartEngine = Callable[[], Awaitable[Engine]]


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A living engine; another one is another Base.

    Attributes:
        name: `models/{model}`.
        engine: what answers.
        processor: of the base alone, with its default bounds.
        token_bytes: bytes by token id.
        stop_ids: tokens that end an answer.
    """

    name: ModelName
    engine: Engine
    processor: Processor
    token_bytes: TokenBytes
    stop_ids: tuple[int, ...]

    @property
    def own_contract(self) -> ProcessingContract:
        """The processing contract with the model's own pixel bounds."""
        bounds = self.processor.model_bounds
        contract = self.processor.contract
        return replace(contract, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)

    @property
    def most_tokens(self) -> int:
        """The longest sequence that fits context and memory."""
        return min(self.engine.info.context_length, self.engine.info.kv_capacity_tokens)


class BaseKeeper:
    """Keeps one base alive.

    Args:
        name: `models/{model}`.
        directory: of the model.
        start_engine: starts another engine.
        serving: is told whether answers can be given, on the event loop.
        own_bounds: pictures may have all of the model's own bound, not the default at most.
    """

    def __init__(
        self,
        name: ModelName,
        directory: Path,
        start_engine: StartEngine,
        serving: Callable[[bool], None],
        *,
        own_bounds: bool = False,
    ) -> None:
        self._name = name
        self._directory = directory
        self._start_engine = start_engine
        self._serving = serving
        self._own_bounds = own_bounds
        self._base: Base | None = None
        self._text: _Text | None = None

    @property
    def current(self) -> Base:
        """The living base.

        Raises:
            Unavailable: the engine is being started.
        """
        if self._base is None:
            raise Unavailable("ENGINE_STARTING", "the engine of this replica is being started", retry_after_s=_RETRY_S)
        return self._base

    async def run(self, started: Callable[[], None]) -> None:
        """Keeps an engine alive until cancelled.

        Args:
            started: is called once the first engine has given a token.

        Raises:
            Exception: the first engine could not be started: the settings are wrong, not the moment.
        """
        base = await self._start()
        started()
        while True:
            try:
                await base.engine.gone()
            finally:
                self._base = None
                self._serving(False)
                await base.engine.close()
            _log.error("the engine has died; starting another")
            base = await self._start_again()

    async def _start(self) -> Base:
        engine = await self._start_engine()
        try:
            if self._text is None or self._text.model_digest != engine.info.model_digest:
                self._text = await in_thread(_Text, self._directory, engine.info.model_digest, self._own_bounds)
            base = Base(self._name, engine, self._text.processor, self._text.token_bytes, self._text.stop_ids)
            await _first_token(base)
        except BaseException:
            await engine.close()
            raise
        self._base = base
        self._serving(True)
        _log.info("engine answers", engine=engine.info.engine, dtype=engine.info.dtype, device=engine.info.device)
        return base

    async def _start_again(self) -> Base:
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return await self._start()
            except Exception:
                _log.exception("the engine cannot be started", retry_s=wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)


def engine_prompt(encoded: Encoded, picture_digests: tuple[str, ...], *, to_score: bool = False) -> EnginePrompt:
    """An encoded conversation as the engine takes it."""
    if encoded.patches_N_P is None:
        raise AssertionError("patches were not asked for")
    return EnginePrompt(
        encoded.ids_T,
        encoded.positions_3_T,
        encoded.rope_delta,
        encoded.grids_n_3,
        encoded.patches_N_P,
        picture_digests,
        encoded.supervised_T if to_score else None,
    )


@asynccontextmanager
async def closed_in_the_end(items: AsyncIterator[_T]) -> AsyncIterator[AsyncIterator[_T]]:
    """Closes an iterator however its reader leaves: for an engine's answer, that cancels it."""
    try:
        yield items
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()


class _Text:
    """What a model's directory says about text; the same for every engine of one model."""

    def __init__(self, directory: Path, model_digest: str, own_bounds: bool) -> None:
        self.model_digest = model_digest
        self.processor = Processor.load(directory, model_digest)
        if own_bounds:
            bounds = self.processor.model_bounds
            own = replace(self.processor.contract, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
            self.processor = self.processor.under(own)
        self.token_bytes = TokenBytes(directory)
        self.stop_ids = tuple(sorted({self.processor.special.im_end, *_end_ids(directory)}))


def _end_ids(directory: Path) -> list[int]:
    """What the model's own generation settings end an answer with; none where there are no such settings."""
    path = directory / _GENERATION_CONFIG
    found = json.loads(path.read_bytes()).get("eos_token_id", []) if path.exists() else []
    return found if isinstance(found, list) else [found]


async def _first_token(base: Base) -> None:
    """Draws one token from the base: what was loaded is no proof that it answers."""
    question = Conversation((Message("user", (Text("Hello"),)),))
    encoded = await in_thread(base.processor.encode_prompt, question)
    sampling = Sampling(max_tokens=1, stop_ids=base.stop_ids)
    async with closed_in_the_end(
        base.engine.generate(_CHECK_TENANT, "", engine_prompt(encoded, ()), sampling)
    ) as steps:
        async for step in steps:
            if step.token_ids:
                return
    raise RuntimeError("the engine ended its first answer without a token")
