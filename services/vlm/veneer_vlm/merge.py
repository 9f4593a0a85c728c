"""A base and an adapter as one model that stands alone: what PEFT's `merge_and_unload` gives, written shard by shard.

Owns the arithmetic W + s B A, the shards and the small files beside them. Never holds more than a shard in memory.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from veneer_processing import PixelBounds
from veneer_vlm.config import ModelConfig
from veneer_vlm.layout import tensor_shapes
from veneer_vlm.lora import Adapter
from veneer_vlm.weights import stored_tensors

SHARD_BYTES = 1 << 30

SURROUNDINGS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""What stands beside a model's weights and config, as transformers names it."""


def merge(
    base: Path,
    adapter: Adapter,
    bounds: PixelBounds,
    dtype: torch.dtype,
    target: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that plain transformers loads without PEFT.

    Args:
        base: the base's directory.
        adapter: in float32, on the CPU.
        bounds: on a picture's area, that the adapter was trained with; the directory's processor keeps them.
        dtype: of the written weights; sums are computed in float32 and rounded once.
        target: made by this.
        shard_bytes: most bytes of a file, unless one tensor alone has more.

    Raises:
        RefusedError: the base cannot be read.
        FileExistsError: the target is there.
    """
    target.mkdir(parents=True)
    shapes = tensor_shapes(ModelConfig.from_directory(base))
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    pending: dict[str, Tensor] = {}
    shards: list[list[str]] = []

    def flush() -> None:
        if pending:
            save_file(pending, target / _part(len(shards)), metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()

    for name, tensor in merged_tensors(base, adapter, dtype):
        if sum(sizes[each] for each in pending) + sizes[name] > shard_bytes:
            flush()
        pending[name] = tensor
    flush()
    _name_shards(target, shards, sum(sizes.values()))
    write_surroundings(base, target, bounds)
    write_config(base, target, dtype)


def merged_tensors(base: Path, adapter: Adapter, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the merged model by its name in the checkpoint, one at a time."""
    config = ModelConfig.from_directory(base)
    shapes = tensor_shapes(config)
    for name, stored in stored_tensors(base):
        if name not in shapes:  # a tied head that some tools store
            continue
        pair = adapter.pairs.get(name.removesuffix(".weight"))
        tensor = stored.float()
        if pair is not None:
            tensor = tensor + (pair.b_O_R @ pair.a_R_I) * adapter.config.scale
        yield name, tensor.to(dtype).contiguous().clone()


def write_surroundings(base: Path, target: Path, bounds: PixelBounds) -> None:
    """Writes tokenizer, template and processor settings; the latter under the bounds."""
    for name in SURROUNDINGS:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = target / name
        if not path.is_file():
            continue
        settings = json.loads(path.read_text("utf-8"))
        own = settings if name == "preprocessor_config.json" else settings.get("image_processor")
        if isinstance(own, dict):
            _bound(own, bounds)
            _write_json(path, settings)


def write_config(base: Path, target: Path, dtype: torch.dtype) -> None:
    """Writes the model's config.json with the dtype of the written weights."""
    config = json.loads((base / "config.json").read_text("utf-8"))
    name = str(dtype).removeprefix("torch.")
    for section in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = name
    if "torch_dtype" not in config:
        config["dtype"] = name
    _write_json(target / "config.json", config)


def _bound(settings: dict[str, Any], bounds: PixelBounds) -> None:
    settings["size"] = {"shortest_edge": bounds.min_pixels, "longest_edge": bounds.max_pixels}
    for key, value in (("min_pixels", bounds.min_pixels), ("max_pixels", bounds.max_pixels)):
        if settings.get(key) is not None:
            settings[key] = value


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _name_shards(target: Path, shards: list[list[str]], size_bytes: int) -> None:
    """Gives the files the names that transformers looks for, and lists them where there are several."""
    if len(shards) == 1:
        (target / _part(0)).rename(target / "model.safetensors")
        return
    places = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (target / _part(number)).rename(target / file)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": size_bytes}, "weight_map": places}
    _write_json(target / "model.safetensors.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
