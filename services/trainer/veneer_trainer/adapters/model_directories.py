"""The bases that the operator installed, as directories; read for what the trainer must know, never loaded.

Torch has no part in it: shapes come from the headers of the weights' files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from veneer_digests import model_digest, read_safetensors_header
from veneer_processing import PixelBounds, ProcessingContract, Processor
from veneer_rpc.errors import NotFound
from veneer_rpc.names import ModelName
from veneer_trainer.domain.targets import Linear
from veneer_trainer.ports import BaseModel

# Module names of Qwen3-VL's checkpoints.
_DECODER = "model.language_model.layers."
_TOWER = "model.visual."
_MERGERS = (f"{_TOWER}merger.", f"{_TOWER}deepstack_merger_list.")
_VISION_LAYERS = f"{_TOWER}blocks."


class ModelDirectories:
    """The ModelCatalog of some directories, each read when it is made: hashing takes a second per gigabyte.

    Args:
        directories: by model name.

    Raises:
        ProcessingError, DigestError, OSError: a directory is not a model's.
    """

    def __init__(self, directories: Mapping[ModelName, Path]) -> None:
        self._bases: dict[ModelName, BaseModel] = {}
        self._contracts: dict[ModelName, ProcessingContract] = {}
        for name, directory in directories.items():
            digest = model_digest(directory)
            processor = Processor.load(directory, digest)
            config = json.loads((directory / "config.json").read_bytes())
            self._contracts[name] = processor.contract
            self._bases[name] = BaseModel(
                name,
                digest,
                config["text_config"]["max_position_embeddings"],
                processor.model_bounds.max_pixels,
                _linears(directory),
            )

    def get(self, name: ModelName) -> BaseModel:
        """See ModelCatalog."""
        if name not in self._bases:
            raise NotFound("MODEL_UNKNOWN", f"there is no {name}", resource=str(name))
        return self._bases[name]

    def contract_digest(self, name: ModelName, max_pixels: int) -> str:
        """See ModelCatalog."""
        contract = self._contracts[name]
        bounds = PixelBounds(min(contract.min_pixels, max_pixels), max_pixels)
        return replace(contract, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels).digest


def _linears(directory: Path) -> dict[str, Linear]:
    """Every linear that an adapter may sit on, from the shapes of the weights."""
    found: dict[str, Linear] = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, slot in read_safetensors_header(file).slots.items():
            group = _group(name)
            if group and len(slot.shape) == 2 and name.endswith(".weight"):
                found[name.removesuffix(".weight")] = Linear(group, *slot.shape)
    return found


def _group(name: str) -> str:
    if name.startswith(_DECODER):
        return "decoder"
    if name.startswith(_MERGERS):
        return "merger"
    return "vision" if name.startswith(_VISION_LAYERS) else ""
