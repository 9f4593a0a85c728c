"""What the benchmarks of inference ask: an engine on a base on disk, adapters, prompts, and streams with times."""

import argparse
import asyncio
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from veneer_digests import adapter_digest, contract_digest, model_digest, tensor_digests
from veneer_inference.engine.client import EngineProcess
from veneer_inference.ports import EnginePrompt, Sampling
from veneer_vlm.config import ModelConfig
from veneer_vlm.layout import adaptable_linears, tensor_shapes
from veneer_vlm.lora import Adapter, AdapterConfig
from veneer_vlm.peft_folder import CONFIG_FILE, TENSOR_FILE, write

DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def arguments(text: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark of the engine has."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("base", type=Path, help="made with `veneer base random --shape qwen3-vl-2b --out DIR`")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(BYTES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--speculation", action="store_true", help="guess ahead: random weights repeat themselves, and flatter it"
    )
    parser.add_argument("--runs", type=int, default=5)
    return parser


@dataclass
class Setting:
    """A base and its adapters on disk."""

    base: Path
    digest: str
    config: ModelConfig
    adapters: list[tuple[str, Path]] = field(default_factory=list)

    @classmethod
    def of(cls, base: Path) -> "Setting":
        return cls(base, model_digest(base), ModelConfig.from_directory(base))

    def make_adapters(self, count: int, folder: Path, targets: Sequence[str] = DECODER_LINEARS) -> None:
        """Random adapters of the benchmarks' rank.

        They share one file of tensors and differ in alpha, which makes them other adapters: hundreds of them take
        the disk of one, and memory of their own once they are loaded.
        """
        first = folder / "adapter-0"
        for number in range(count):
            directory = folder / f"adapter-{number}"
            config = AdapterConfig(r=RANK, lora_alpha=RANK + number, target_modules=tuple(targets))
            if number == 0:
                adapter = Adapter.new(self.config, config, seed=0, dtype=torch.bfloat16)
                for pair in adapter.pairs.values():
                    pair.b_O_R.normal_(0, 0.01)
                write(adapter, directory)
            else:
                directory.mkdir()
                os.link(first / TENSOR_FILE, directory / TENSOR_FILE)
                settings = json.loads((first / CONFIG_FILE).read_text("utf-8")) | {"lora_alpha": RANK + number}
                (directory / CONFIG_FILE).write_text(json.dumps(settings), "utf-8")
            contract: dict[str, Any] = {"model_digest": self.digest, "max_pixels": 200_704}
            (directory / "processing_contract.json").write_text(json.dumps(contract), "utf-8")
            settings = json.loads((directory / CONFIG_FILE).read_text("utf-8"))
            digest = adapter_digest(tensor_digests(directory / TENSOR_FILE), settings, contract_digest(contract))
            self.adapters.append((digest, directory))

    @asynccontextmanager
    async def engine(self, options: argparse.Namespace, **choices: Any) -> AsyncIterator[EngineProcess]:  # noqa: ANN401
        """An engine that holds the adapters."""
        choices |= {"dtype": options.dtype, "speculation": options.speculation}
        engine = await EngineProcess.start(self.base, options.threads, **choices)
        try:
            for digest, directory in self.adapters:
                await engine.load_adapter(digest, directory)
            yield engine
        finally:
            await engine.close()

    def decode_bytes(self, dtype: str) -> int:
        """Bytes of weights that a step of decoding reads: the decoder's linears and the head."""
        head = self.config.text.vocab_size * self.config.text.hidden_size
        return BYTES[dtype] * (self._decoder_weights() + head)

    def prefill_flop(self) -> int:
        """Of a text token, without attention and without the head, which is computed for the last token alone."""
        return 2 * self._decoder_weights()

    def _decoder_weights(self) -> int:
        shapes, linears = tensor_shapes(self.config), adaptable_linears(self.config)
        return sum(
            int(np.prod(shapes[f"{name}.weight"])) for name in linears if name.endswith(DECODER_LINEARS)
        )  # fmt: skip

    def text_prompt(self, tokens: int, seed: int) -> EnginePrompt:
        """Random words."""
        return self.picture_prompt(tokens, seed, grids=())

    def picture_prompt(
        self, tokens: int, seed: int, grids: Sequence[tuple[int, int]], picture_seed: int = 0
    ) -> EnginePrompt:
        """Random pictures of so many rows and columns of patches, and words behind them."""
        random, picture = np.random.default_rng(seed), np.random.default_rng(picture_seed)
        vision = self.config.vision
        merge = vision.spatial_merge_size**2
        patches = sum(rows * columns for rows, columns in grids)
        ids_T = np.concatenate(
            [np.full(patches // merge, self.config.image_token_id), random.integers(0, 100_000, tokens)]
        )
        return EnginePrompt(
            ids_T,
            np.tile(np.arange(len(ids_T)), (3, 1)),
            0,
            np.array([(1, rows, columns) for rows, columns in grids], np.int64).reshape(-1, 3),
            picture.standard_normal((patches, vision.patch_values), np.float32),
            tuple(f"{picture_seed:032x}{index:032x}" for index in range(len(grids))),
        )


@dataclass
class Stream:
    """When the tokens of an answer came, in seconds since it was asked for."""

    asked_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        """Time to first token."""
        return self.tokens_s[0] - self.asked_s

    def longest_gap_s(self, start_s: float, end_s: float) -> float:
        """Between two tokens, in gaps that overlap a time."""
        pairs = itertools.pairwise(self.tokens_s)
        return max((after - before for before, after in pairs if after > start_s and before < end_s), default=0.0)


async def stream(
    engine: EngineProcess, adapter: str, prompt: EnginePrompt, tokens: int, found: Stream | None = None
) -> Stream:
    """An answer of exactly so many tokens, greedy; `found` can be watched while it grows."""
    found = found or Stream()
    found.asked_s = time.perf_counter()
    async for step in engine.generate("bench", adapter, prompt, Sampling(tokens)):
        found.tokens_s += [time.perf_counter()] * len(step.token_ids)
    return found


async def streams(
    engine: EngineProcess, adapters: Sequence[str], prompts: Sequence[EnginePrompt], tokens: int
) -> list[Stream]:
    """Answers side by side."""
    asked = (stream(engine, *each, tokens) for each in zip(adapters, prompts, strict=True))
    return await asyncio.gather(*asked)


def tokens_per_s(found: Sequence[Stream]) -> float:
    """While all of them decode: from the last one's first token to the first one's last.

    Raises:
        ValueError: they never decode all at once.
    """
    start_s, end_s = max(each.tokens_s[0] for each in found), min(each.tokens_s[-1] for each in found)
    if end_s <= start_s:
        raise ValueError("the first stream ended before the last began: give --answer more tokens")
    return sum(start_s < each <= end_s for one in found for each in one.tokens_s) / (end_s - start_s)
