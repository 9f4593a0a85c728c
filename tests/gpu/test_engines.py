"""Engines on a GPU give the answers that the CPU gives, within the tie rule: a token may differ only where the best two
logits lie within 1e-3 (fp32) or 0.125 (bf16)."""

import asyncio
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from veneer_base.unfold import base_directory
from veneer_digests import adapter_digest, contract_digest, model_digest, tensor_digests
from veneer_inference.engine.client import EngineProcess
from veneer_inference.engine.vllm_engine import VllmEngine
from veneer_inference.ports import Engine, EnginePrompt, Sampling
from veneer_vlm.attention import PackedAttention
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig
from veneer_vlm.peft_folder import read, write
from veneer_vlm.weights import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; this machine has none"),
]
TIES = {"float32": 1e-3, "bfloat16": 0.125}
TOKENS = 12
ADAPTERS = 3
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base() -> Path:
    return base_directory()


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    found = []
    model, digest = load(base), model_digest(base)
    for seed in range(ADAPTERS):
        directory = tmp_path_factory.mktemp("adapter")
        config = AdapterConfig(r=4, lora_alpha=32, target_modules=LINEARS)
        adapter = Adapter.new(model.config, config, seed)
        generator = torch.Generator().manual_seed(seed)
        for pair in adapter.pairs.values():
            pair.b_O_R.normal_(0, 0.05, generator=generator)
        write(adapter, directory)
        contract = {"model_digest": digest}
        (directory / "processing_contract.json").write_text(json.dumps(contract))
        settings = json.loads((directory / "adapter_config.json").read_text())
        tensors = tensor_digests(directory / "adapter_model.safetensors")
        found.append((adapter_digest(tensors, settings, contract_digest(contract)), directory))
    return found


def prompt(seed: int, tokens: int) -> EnginePrompt:
    ids_T = np.random.default_rng(seed).integers(1000, 50_000, tokens)
    return EnginePrompt(
        ids_T, np.tile(np.arange(tokens), (3, 1)), 0, np.zeros((0, 3), np.int64), np.zeros((0, 0), np.float32)
    )


async def answers(engine: Engine, adapters: list[tuple[str, Path]]) -> list[list[int]]:
    """A mixed batch: every adapter and the base, prompts of several lengths."""
    for digest, directory in adapters:
        await engine.load_adapter(digest, directory)

    async def one(index: int, digest: str) -> list[int]:
        steps = engine.generate("t", digest, prompt(index, 20 + 17 * index), Sampling(TOKENS))
        return [token async for step in steps for token in step.token_ids]

    worn = ["", *(digest for digest, _ in adapters)]
    return list(await asyncio.gather(*(one(index, digest) for index, digest in enumerate(worn))))


def check(base: Path, adapters: list[tuple[str, Path]], found: list[list[int]], tie: float) -> None:
    """Each token is the likeliest on the CPU in float32 after those before it, or as good as it."""
    model = load(base)
    worn = [None, *(read(directory, model.config) for _, directory in adapters)]
    for index, (answer, adapter) in enumerate(zip(found, worn, strict=True)):
        ids_T = torch.from_numpy(np.concatenate([prompt(index, 20 + 17 * index).ids_T, answer]))
        length = len(ids_T) - len(answer)
        positions_3_T = torch.arange(len(ids_T)).expand(3, -1)
        with torch.inference_mode():
            lora = AdapterBatch.uniform(adapter, len(ids_T)) if adapter else None
            hidden_T_D = model(ids_T, positions_3_T, PackedAttention([len(ids_T)]), None, lora)
            logits_N_V = model.logits(hidden_T_D[length - 1 : -1]).float()
        chosen_N = logits_N_V.gather(1, ids_T[length:, None])[:, 0]
        assert len(answer) == TOKENS
        assert (logits_N_V.max(1).values - chosen_N).max() <= tie


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_the_engine_on_cuda_answers_as_the_cpu_does(
    base: Path, adapters: list[tuple[str, Path]], dtype: str
) -> None:
    engine = await EngineProcess.start(base, 4, dtype=dtype)
    try:
        assert engine.info.device == "cuda"
        check(base, adapters, await answers(engine, adapters), TIES[dtype])
    finally:
        await engine.close()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
async def test_vllm_answers_as_the_cpu_does(base: Path, adapters: list[tuple[str, Path]]) -> None:
    engine = await VllmEngine.start(
        base, dtype="bfloat16", slots=ADAPTERS, max_rank=8, max_requests=16, context_length=512
    )
    try:
        check(base, adapters, await answers(engine, adapters), TIES["bfloat16"])
    finally:
        await engine.close()
