"""The bases that the operator installed, as directories; read for what the trainer must know, never loaded.

Torch has no part in it: shapes come from the headers of the weights' files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from veneer_digests import SafetensorsHeader, model_digest, read_safetensors_header
from veneer_processing import PixelBounds, ProcessingContract, read_contract
from veneer_rpc.errors import NotFound
from veneer_rpc.names import ModelName
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Contract
from veneer_trainer.domain.targets import Linear
from veneer_trainer.ports import BaseModel
from veneer_trainer.registry_ports import ModelDetails

# Module names of Qwen3-VL's checkpoints.
_DECODER = "model.language_model.layers."
_TOWER = "model.visual."
_MERGERS = (f"{_TOWER}merger.", f"{_TOWER}deepstack_merger_list.")
_VISION_LAYERS = f"{_TOWER}blocks."

_SMALL = {".json", ".jinja", ".txt", ".md"}
_INDEX = ".index.json"
_MAX_SMALL_BYTES = 64 << 20


class ModelDirectories:
    """The ModelCatalog and ModelShelf of some directories, each read when this is made: hashing takes a second per GB.

    Args:
        directories: by model name.

    Raises:
        ProcessingError, DigestError, OSError: a directory is not a model's.
    """

    def __init__(self, directories: Mapping[ModelName, Path]) -> None:
        self._directories = dict(directories)
        self._contracts: dict[ModelName, ProcessingContract] = {}
        self._details: dict[ModelName, ModelDetails] = {}
        for name, directory in directories.items():
            digest = model_digest(directory)
            contract, own = read_contract(directory, digest)
            config = json.loads((directory / "config.json").read_bytes())
            headers = [read_safetensors_header(file) for file in sorted(directory.glob("*.safetensors"))]
            linears = _linears(headers)
            context_length = config["text_config"]["max_position_embeddings"]
            base = BaseModel(name, digest, context_length, own.max_pixels, linears)
            self._contracts[name] = contract
            self._details[name] = ModelDetails(
                base,
                next(iter(config.get("architectures") or ()), ""),
                contract_of(replace(contract, min_pixels=own.min_pixels, max_pixels=own.max_pixels)),
                sum(math.prod(slot.shape) for header in headers for slot in header.slots.values()),
                _groups(linears),
                _small_files(directory),
                (directory / "config.json").stat().st_mtime,
            )

    def get(self, name: ModelName) -> BaseModel:
        """See ModelCatalog."""
        return self.details(name).base

    def contract(self, name: ModelName, max_pixels: int) -> Contract:
        """See ModelCatalog."""
        self.details(name)
        contract = self._contracts[name]
        bounds = PixelBounds(min(contract.min_pixels, max_pixels), max_pixels)
        return contract_of(replace(contract, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels))

    def all(self) -> list[ModelDetails]:
        """See ModelShelf."""
        return [details for _, details in sorted(self._details.items(), key=lambda item: str(item[0]))]

    def details(self, name: ModelName) -> ModelDetails:
        """See ModelShelf."""
        if name not in self._details:
            raise NotFound("MODEL_UNKNOWN", f"there is no {name}", resource=str(name))
        return self._details[name]

    def read(self, name: ModelName, path: str, offset: int, size: int) -> bytes:
        """See ModelShelf."""
        if all(file.path != path for file in self.details(name).files):
            raise NotFound("FILE_UNKNOWN", f"{name} has no small file {path[:80]!r}", resource=str(name))
        with (self._directories[name] / path).open("rb") as file:
            file.seek(offset)
            return file.read(size)


def contract_of(contract: ProcessingContract) -> Contract:
    """Returns the domain's form of a processing contract."""
    return Contract(digest=contract.digest, **asdict(contract))


def _linears(headers: list[SafetensorsHeader]) -> dict[str, Linear]:
    """Every linear that an adapter may sit on, from the shapes of the weights."""
    found: dict[str, Linear] = {}
    for header in headers:
        for name, slot in header.slots.items():
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


def _groups(linears: Mapping[str, Linear]) -> dict[str, tuple[str, ...]]:
    """The linears' last names, which PEFT takes, or whole names where those alone would not do, by group."""
    groups: dict[str, set[str]] = {}
    for name, linear in linears.items():
        last = name.rpartition(".")[2]
        groups.setdefault(linear.group, set()).add(name if last.isdigit() else last)
    return {group: tuple(sorted(groups[group])) for group in ("decoder", "merger", "vision") if group in groups}


def _small_files(directory: Path) -> tuple[StoredFile, ...]:
    files = []
    for path in sorted(directory.iterdir(), key=lambda each: each.name):
        if path.is_file() and path.suffix in _SMALL and not path.name.endswith(_INDEX):
            data = path.read_bytes() if path.stat().st_size <= _MAX_SMALL_BYTES else b""
            if data:
                files.append(StoredFile(path.name, hashlib.sha256(data).hexdigest(), len(data)))
    return tuple(files)
