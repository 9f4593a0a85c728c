"""Random weights in Qwen3-VL's full shape, for work on speed and memory. Their answers mean nothing.

Owns the shapes and the shards. One shard is held at a time, so a model may be larger than the memory left.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from veneer_base.tokenizer import tokenizer_json
from veneer_base.unfold import SPECIAL_IDS, surroundings

SHARD_BYTES = 1_000_000_000
SPREAD = 0.02  # standard deviation of matrices, as in the library's initialisation

# Qwen3-VL-2B-Instruct's config.json; the small shape is for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-vl-2b": {
        "text_config": {
            "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 2048,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "tiny": {
        "text_config": {
            "vocab_size": 151_936, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
        },
    },
}  # fmt: skip


def write_random_model(
    shape: str, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, shard_bytes: int = SHARD_BYTES
) -> int:
    """Writes a Hugging Face directory with seeded random weights, shard by shard.

    Returns:
        The number of parameters.

    Raises:
        ValueError: the shape is not one of `SHAPES`.
        FileExistsError: the directory is not empty.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r}: one of {', '.join(SHAPES)}")
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    directory.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {**SHAPES[shape], **SPECIAL_IDS}
    config = Qwen3VLConfig(**fields, tie_word_embeddings=True, dtype=dtype)
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.save_pretrained(directory)
    for name, text in ({"tokenizer.json": tokenizer_json()} | surroundings()).items():
        (directory / name).write_text(text, encoding="utf-8")

    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Qwen3VLForConditionalGeneration(config).named_parameters()}
    shards = list(_shards(shapes, dtype.itemsize, shard_bytes))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: _tensor(name, shapes[name], seed, dtype) for name in names}, directory / file, {"format": "pt"}
        )
        where |= dict.fromkeys(names, file)
    parameters = sum(math.prod(s) for s in shapes.values())
    index = {"metadata": {"total_size": parameters * dtype.itemsize}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return parameters


def _shards(shapes: dict[str, tuple[int, ...]], item_bytes: int, shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_bytes
        if names and filled + size > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _tensor(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Ones for norms' weights, zeros for biases, noise for matrices; a function of the seed and the tensor's name."""
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.empty(shape, dtype=dtype).normal_(std=SPREAD, generator=generator)
