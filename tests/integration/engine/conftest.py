"""A toy base and toy adapters on disk, real engine processes over them, and the same answers computed directly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file

from veneer_digests import adapter_digest, contract_digest, model_digest, tensor_digests
from veneer_inference.engine import messages
from veneer_inference.engine.client import EngineProcess
from veneer_inference.engine.core import EngineCore, Loaded
from veneer_inference.engine.scheduler import Limits
from veneer_inference.ports import EngineError, EnginePrompt, Sampling, Step
from veneer_vlm.attention import PackedAttention
from veneer_vlm.config import ModelConfig
from veneer_vlm.generation import generate
from veneer_vlm.layout import tensor_shapes
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.peft_folder import write
from veneer_vlm.vision import VisualFeatures
from veneer_vlm.weights import load, random_model

IMAGE, VOCABULARY = 250, 256
CONFIG = {
    "model_type": "qwen3_vl",
    "image_token_id": IMAGE,
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2],
    },
}
TARGETS = (
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ("o_proj", "down_proj", "attn.qkv", "merger.linear_fc2"),  # the tower too
)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk."""

    digest: str
    directory: Path
    adapter: Adapter


class Kit:
    """The base, its adapters, and what the right answers are."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base = base
        self.model: VisionLanguageModel = load(base)
        self.model_digest = model_digest(base)
        self._folder = folder
        self.adapters = [self.adapter(seed, 2 << seed, targets) for seed, targets in enumerate(TARGETS)]

    def adapter(self, seed: int, rank: int = 4, targets: tuple[str, ...] = TARGETS[0]) -> SavedAdapter:
        """A random adapter that changes answers, saved."""
        config = AdapterConfig(r=rank, lora_alpha=2.0 * rank, target_modules=targets)
        adapter = Adapter.new(self.model.config, config, seed)
        generator = torch.Generator().manual_seed(seed)
        for pair in adapter.pairs.values():
            pair.b_O_R.normal_(0, 0.5, generator=generator)
        directory = self._folder / f"adapter-{seed}-{rank}"
        write(adapter, directory)
        contract = {"model_digest": self.model_digest, "max_pixels": 200_704}
        (directory / "processing_contract.json").write_text(json.dumps(contract))
        return SavedAdapter(self.digest(directory), directory, adapter)

    @staticmethod
    def digest(directory: Path) -> str:
        """What a folder hashes to."""
        contract = json.loads((directory / "processing_contract.json").read_text())
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = tensor_digests(directory / "adapter_model.safetensors")
        return adapter_digest(tensors, config, contract_digest(contract))

    def prompt(
        self, seed: int, tokens: int = 6, grids: tuple[tuple[int, int], ...] = (), supervised: int = 0
    ) -> EnginePrompt:
        """A random prompt: text, the pictures one after another, text; the last `supervised` tokens are scored."""
        random = np.random.default_rng(seed)
        pieces = [random.integers(0, IMAGE, tokens - tokens // 2)]
        pieces += [np.full(rows * columns // 4, IMAGE) for rows, columns in grids]
        pieces += [random.integers(0, IMAGE, tokens // 2)]
        ids_T = np.concatenate(pieces)
        marks = np.zeros(len(ids_T), bool)
        marks[len(ids_T) - supervised :] = True
        return EnginePrompt(
            ids_T,
            np.tile(np.arange(len(ids_T)), (3, 1)),
            0,
            np.array([(1, rows, columns) for rows, columns in grids], np.int64).reshape(-1, 3),
            random.standard_normal((sum(rows * columns for rows, columns in grids), 96), np.float32),
            tuple(f"{seed:032}{index:032}" for index in range(len(grids))),
            marks if supervised else None,
        )

    def visual(self, prompt: EnginePrompt, adapter: Adapter | None) -> VisualFeatures | None:
        """The features of a prompt's pictures."""
        if not len(prompt.grids_n_3):
            return None
        grids = [tuple(grid) for grid in prompt.grids_n_3.tolist()]
        lora = AdapterBatch.uniform(adapter, len(prompt.patches_N_P)) if adapter and _sees(adapter) else None
        with torch.inference_mode():
            return self.model.see(torch.from_numpy(prompt.patches_N_P), grids, lora)

    def answer(self, prompt: EnginePrompt, saved: SavedAdapter | None, tokens: int) -> list[int]:
        """What `veneer_vlm` itself answers, greedily."""
        adapter = saved.adapter if saved else None
        return list(
            generate(
                self.model,
                torch.from_numpy(prompt.ids_T),
                torch.from_numpy(prompt.positions_3_T),
                max_tokens=tokens,
                visual=self.visual(prompt, adapter),
                adapter=adapter,
            )
        )

    def logprobs(self, prompt: EnginePrompt, saved: SavedAdapter | None) -> torch.Tensor:
        """Log-probabilities (T, V) after every token of a prompt."""
        adapter = saved.adapter if saved else None
        tokens = len(prompt.ids_T)
        with torch.inference_mode():
            hidden_T_D = self.model(
                torch.from_numpy(prompt.ids_T),
                torch.from_numpy(prompt.positions_3_T),
                PackedAttention([tokens]),
                self.visual(prompt, adapter),
                AdapterBatch.uniform(adapter, tokens),
            )
            return self.model.logits(hidden_T_D).log_softmax(-1)

    def core(self, **choices: Any) -> Core:  # noqa: ANN401  # those of Core
        """An engine without its process."""
        return Core(self, **choices)

    async def tokens(
        self,
        engine: EngineProcess,
        prompt: EnginePrompt,
        saved: SavedAdapter | None,
        sampling: Sampling,
        tenant: str = "t",
    ) -> list[int]:
        """What the engine answers."""
        steps = await self.steps(engine, prompt, saved, sampling, tenant)
        return [token for step in steps for token in step.token_ids]

    async def steps(
        self,
        engine: EngineProcess,
        prompt: EnginePrompt,
        saved: SavedAdapter | None,
        sampling: Sampling,
        tenant: str = "t",
    ) -> list[Step]:
        """An answer of the engine, step by step."""
        return [step async for step in engine.generate(tenant, saved.digest if saved else "", prompt, sampling)]

    async def refusal(self, call: Awaitable[Any]) -> EngineError:
        """The error that a call ends with."""
        with pytest.raises(EngineError) as caught:
            await call
        return caught.value

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what will be so."""
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110  # another process brings it about
                await asyncio.sleep(0.01)

    async def load_all(self, engine: EngineProcess) -> None:
        """Loads all adapters."""
        for saved in self.adapters:
            await engine.load_adapter(saved.digest, saved.directory)


SAMPLING = Sampling(20, logprobs=2)


class Core:
    """An engine that answers a batch at a time."""

    def __init__(self, kit: Kit, *, step_tokens: int = 512, blocks: int = 64, **choices: bool) -> None:
        limits = Limits(512, blocks, step_tokens=step_tokens)
        self.core = EngineCore(kit.model, limits, 4, 1 << 24, 1 << 24, lambda *_: None, **choices)
        for number, saved in enumerate(kit.adapters):
            self.core.handle(messages.Load(-number, saved.digest, ""))
            self.core.handle(Loaded(saved.digest, saved.adapter))
        self.key = 0
        self.counters: dict[str, int] = {}

    def ask(
        self,
        *asked: tuple[EnginePrompt, SavedAdapter | None, str],
        sampling: Sampling | None = SAMPLING,
    ) -> list[list[Step]]:
        """Answers prompts, each with an adapter and a tenant, in one batch."""
        steps: dict[int, list[Step]] = {}
        for prompt, saved, tenant in asked:
            self.key += 1
            steps[self.key] = []
            packed, worn = messages.Prompt.of(prompt), saved.digest if saved else ""
            self.core.handle(
                messages.Generate(self.key, tenant, worn, packed, sampling)
                if sampling
                else messages.Score(self.key, tenant, worn, packed, 2)
            )
        while not self.core.idle:
            report = self.core.step()
            assert not report.failures
            for progress in report.progress:
                steps[progress.key].append(progress.step)
            for done in report.done:
                if done.key in steps:
                    steps[done.key].append(Step((), done.scores))
            self.counters = report.stats.counters
        assert report.stats.kv_tokens_in_use == 0
        return list(steps.values())


def _sees(adapter: Adapter) -> bool:
    return any(".visual." in name for name in adapter.pairs)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("base")
    model = random_model(ModelConfig.from_dict(CONFIG), seed=1)
    generator = torch.Generator().manual_seed(2)
    for slot in model.slots().values():
        if slot.ndim > 1:  # large enough that a slip shows in the answer
            slot.normal_(0, 1.5 / slot[0].numel() ** 0.5, generator=generator)
    model.slots()["model.language_model.embed_tokens.weight"].normal_(0, 0.5, generator=generator)
    model.slots()["lm_head.weight"][IMAGE] = 0  # `veneer_vlm.generation` cannot go on from this token
    shapes = tensor_shapes(model.config)
    tensors = {name: slot.reshape(shapes[name]).clone() for name, slot in model.slots().items()}
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(CONFIG))
    return Kit(base, tmp_path_factory.mktemp("adapters"))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine(kit: Kit) -> AsyncIterator[EngineProcess]:
    """An engine that the tests of a file share; each leaves it as quiet as it was."""
    engine = await EngineProcess.start(kit.base, 1)
    await kit.load_all(engine)
    yield engine
    await engine.close()
