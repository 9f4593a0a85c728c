"""Weights of a base: found, checked and loaded, or drawn at random.

Owns the way from a directory or a hub id to a filled `VisionLanguageModel`. Reads safetensors only, never
pickle, and fills nothing unless every tensor is there with its shape.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import WeightsError
from veneer_vlm.layout import DECODER, HEAD, tensor_shapes
from veneer_vlm.model import VisionLanguageModel

_SINGLE = "model.safetensors"
_EMBEDDING = f"{DECODER}embed_tokens.weight"
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
_MAPPED_BYTES = 16 << 20  # what was read of a file is this process's memory until it is closed
_INITIAL_STD = 0.02  # initializer_range of Qwen3-VL's published configurations


def locate(reference: str) -> Path:
    """The local directory of a base, given its path or its id on the Hugging Face hub.

    A hub id is fetched into the hub's cache, or only looked up there where HF_HUB_OFFLINE is set.

    Raises:
        WeightsError: neither a directory nor a hub id that can be had, with what to do about it.
    """
    directory = Path(reference)
    if directory.is_dir():
        return directory
    if not _HUB_ID.fullmatch(reference):
        raise WeightsError(reference, ["is neither a directory nor a hub id of the form owner/name"])
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(reference, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise WeightsError(
            reference,
            [
                "is no local directory, is not in the hub's cache and could not be fetched "
                f"({type(error).__name__}); give the path of a directory, or run "
                f"`hf download {reference}` where the hub can be reached"
            ],
        ) from error


def load(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    as_stored: bool = False,
    tower_mapped: bool = False,
) -> VisionLanguageModel:
    """A model filled from `model.safetensors`, or from the shards that `model.safetensors.index.json` lists.

    Tensors are mapped and copied in pieces: the peak is the model plus some MiB, and plus a tied head that is stored.

    Args:
        directory: of the base.
        dtype: of hidden states and weights.
        device: of the weights.
        as_stored: on a CPU, large weights that are stored in fewer bits than `dtype` has stay so: half the memory, and
            products of the same numbers.
        tower_mapped: on a CPU, the vision tower's weights that have the dtype they are stored in are not copied but
            stay in their files, which must not change: `VisionLanguageModel.let_go_of_tower` frees their memory.

    Raises:
        ConfigError: its configuration is not one this forward pass has.
        WeightsError: with all tensors that are missing, unknown or of a wrong shape.
    """
    config = ModelConfig.from_directory(directory)
    shapes = tensor_shapes(config)
    files = _files_by_tensor(directory)
    tied_head = f"{HEAD}.weight" if config.tie_word_embeddings else None
    dtypes = set[torch.dtype]()
    violations = [f"tensor {name} is missing" for name in shapes if name not in files]
    if tied_head:
        shapes = shapes | {tied_head: shapes[_EMBEDDING]}
    violations += [f"tensor {name} is unknown" for name in files if name not in shapes]
    for name, tensor in _tensors(files):
        wanted = shapes.get(name, tuple(tensor.shape))
        if tuple(tensor.shape) != wanted:
            violations.append(f"tensor {name} has shape {tuple(tensor.shape)}, {wanted} is needed")
        elif not tensor.is_floating_point():
            violations.append(f"tensor {name} is {tensor.dtype}, a float is needed")
        dtypes.add(tensor.dtype)
    if violations:
        raise WeightsError(str(directory), violations)

    on_cpu = torch.device(device).type == "cpu"
    (stored,) = dtypes if as_stored and len(dtypes) == 1 and on_cpu else (dtype,)
    narrower = stored in (torch.bfloat16, torch.float16) and stored.itemsize < dtype.itemsize
    model = VisionLanguageModel.empty(config, dtype, device, stored if narrower else None)
    slots = model.slots()
    if tied_head:
        # Some tools store the head although it is tied; that is harmless as long as it says the same.
        slots[tied_head] = model.lm_head.weight.data.clone() if tied_head in files else model.lm_head.weight.data
    if tower_mapped and on_cpu:
        _map_tower(model, slots, files)
    for name, start, rows in _pieces(files):
        slot = slots[name][start : start + len(rows)]
        slot.copy_(rows.reshape(slot.shape))
    if tied_head and not torch.equal(slots[tied_head], slots[_EMBEDDING]):
        raise WeightsError(str(directory), [f"tensor {tied_head} differs from the embedding it is tied to"])
    return model


def random_model(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> VisionLanguageModel:
    """A model without knowledge, for tests and for speed: normal weights, unit norms, zero biases.

    Each tensor is drawn from a generator of its own on the device, keyed by seed and name.
    """
    model = VisionLanguageModel.empty(config, dtype, device)
    for name, slot in model.slots().items():
        if name.endswith(".bias"):
            slot.zero_()
        elif "norm" in name.split(".")[-2]:
            slot.fill_(1)
        else:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(slot.device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            slot.normal_(0, _INITIAL_STD, generator=generator)
    return model


def stored_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model's files by its name there, mapped and not read.

    Raises:
        WeightsError: files are missing or cannot be read.
    """
    yield from _tensors(_files_by_tensor(directory))


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor, as the files themselves say."""
    index = directory / _INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            strangers = [shard for shard in shards if Path(shard).name != shard]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(str(index), [f"is no index of shards: {error!r}"]) from error
        if strangers:
            raise WeightsError(str(index), [f"{shard!r} is no file beside it" for shard in strangers])
    else:
        shards = [_SINGLE]
    violations = []
    files: dict[str, Path] = {}
    for shard in shards:
        path = directory / shard
        if not path.is_file():
            violations.append(f"{shard} is missing")
            continue
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            violations.append(f"{shard} cannot be read: {error}")
    if violations:
        raise WeightsError(str(directory), violations)
    return files


class _Mapped:
    """Files of tensors. One is opened anew after some MiB, for only then what was read of it is let go."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None
        self._read_bytes = 0

    def file(self, path: Path) -> Any:  # noqa: ANN401  # safe_open has no types
        """The file, open; no tensor of it may be kept."""
        if path != self._path or self._read_bytes >= _MAPPED_BYTES:
            self._path, self._file, self._read_bytes = path, safe_open(path, framework="pt"), 0
        return self._file

    def has_read(self, tensor: torch.Tensor) -> None:
        """Counts what was read."""
        self._read_bytes += tensor.nbytes


def _map_tower(model: VisionLanguageModel, slots: dict[str, torch.Tensor], files: dict[str, Path]) -> None:
    """Has weights of the tower be their file's own memory, and takes their tensors out of `files`."""
    parameters = {parameter.data_ptr(): parameter for parameter in model.visual.parameters()}
    names = [name for name, slot in slots.items() if slot.data_ptr() in parameters]
    opened: dict[Path, Any] = {path: safe_open(path, framework="pt") for path in {files[name] for name in names}}
    for name in names:
        tensor, parameter = opened[files[name]].get_tensor(name), parameters[slots[name].data_ptr()]
        if tensor.dtype is parameter.dtype and tensor.numel() == parameter.numel():
            parameter.data = tensor.view(parameter.shape)
            model.mapped.append(tensor)
            del files[name]


def _tensors(files: dict[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, mapped and not read, file by file."""
    mapped = _Mapped()
    for name, path in files.items():
        tensor = mapped.file(path).get_tensor(name)
        yield name, tensor
        mapped.has_read(tensor)


def _pieces(files: dict[str, Path]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Every tensor by some of its rows, mapped and not read, each time with the index of the first."""
    mapped = _Mapped()
    for name, path in files.items():
        row_count = mapped.file(path).get_slice(name).get_shape()[0]
        rows_at_once = max(1, _MAPPED_BYTES // mapped.file(path).get_slice(name)[:1].nbytes)
        for start in range(0, row_count, rows_at_once):
            rows = mapped.file(path).get_slice(name)[start : start + rows_at_once]
            yield name, start, rows
            mapped.has_read(rows)
