"""The digests of weights, an adapter version's and a model's, and of the contract that an adapter stands on.

Lineage, base path, a file's metadata and the order of tensors and files are outside. Works from safetensors
files in pieces, so a model of any size costs 4 MiB per thread.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer_digests.errors import DigestError, NotCanonicalError, SafetensorsError, shown
from veneer_digests.forward_config import adapter_forward_config, model_forward_config
from veneer_digests.jcs import canonical_json, parse_json
from veneer_digests.preimage import digest_bytes, domain, sized, unsigned, utf8
from veneer_digests.safetensors_file import TensorSlot, read_safetensors_header, read_slot, tensor_size_bytes

_CONTRACT_DOMAIN = domain("contract")
_ADAPTER_DOMAIN = domain("adapter")
_MODEL_DOMAIN = domain("model")
_GRAPHS_DOMAIN = domain("graphs")

_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")

# For less than this, starting threads costs what they save.
_THREADS_FROM_BYTES = 16 << 20
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """One tensor's part in a digest: name, safetensors dtype, shape, and SHA-256 of its bytes in hex."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


def tensor_digest(name: str, dtype: str, shape: Iterable[int], data: bytes | bytearray | memoryview) -> TensorDigest:
    """The part of a tensor in memory: `data` is what safetensors would write, little-endian and row-major.

    Raises:
        SafetensorsError: an unknown dtype, or bytes that do not fit dtype and shape.
    """
    shape = tuple(shape)
    place = f"tensor {shown(name)}"
    size_bytes = tensor_size_bytes(dtype, shape, place)
    if memoryview(data).nbytes != size_bytes:
        raise SafetensorsError(f"{place}: {memoryview(data).nbytes} bytes, {size_bytes} by its shape")
    return TensorDigest(name, dtype, shape, hashlib.sha256(data).hexdigest())


def tensor_digests(path: Path, threads: int | None = None) -> list[TensorDigest]:
    """The parts of every tensor of a safetensors file, hashed by `threads` (None: all cores, at most 8).

    Raises:
        SafetensorsError: not a well-formed safetensors file.
        OSError: the file cannot be read.
    """
    slots = list(read_safetensors_header(path).slots.values())
    # The largest first, so that no thread is left with it when the others are done.
    slots.sort(key=lambda slot: slot.size_bytes, reverse=True)
    with path.open("rb") as file:
        descriptor = file.fileno()

        def part(slot: TensorSlot) -> TensorDigest:
            digest = hashlib.sha256()
            for piece in read_slot(descriptor, slot):
                digest.update(piece)
            return TensorDigest(slot.name, slot.dtype, slot.shape, digest.hexdigest())

        if sum(slot.size_bytes for slot in slots) < _THREADS_FROM_BYTES:
            return [part(slot) for slot in slots]
        with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
            return list(pool.map(part, slots))


def contract_digest(contract: Mapping[str, Any]) -> str:
    """The digest of a processing contract, a JSON object; 64 hex digits.

    Raises:
        NotCanonicalError: it has no canonical JSON.
    """
    return hashlib.sha256(_CONTRACT_DOMAIN + canonical_json(dict(contract))).hexdigest()


def adapter_digest(tensors: Iterable[TensorDigest], config: Mapping[str, Any], contract: str) -> str:
    """The digest of an adapter version; 64 hex digits.

    Args:
        tensors: its parts, in any order: `tensor_digests(path)`.
        config: PEFT's adapter_config.json; `adapter_forward_config` says what of it counts.
        contract: the digest of its processing contract.

    Raises:
        NotCanonicalError: a config without r or lora_alpha, or without a canonical form.
        DigestError: a tensor's name twice, or a malformed digest.
    """
    preimage = _ADAPTER_DOMAIN + digest_bytes(contract, "contract digest")
    return _weights_digest(preimage, adapter_forward_config(config), tensors)


def model_digest(directory: Path, threads: int | None = None) -> str:
    """The digest of a model's directory: config.json, and its one or many safetensors files; 64 hex digits.

    Raises:
        SafetensorsError: files that are malformed, or that do not hold just the tensors of their index.
        NotCanonicalError: a config without a canonical form.
        OSError: a file is missing or cannot be read.
    """
    config = _json_object(directory / "config.json")
    index_path = directory / "model.safetensors.index.json"
    if not index_path.exists():
        return model_digest_of(tensor_digests(directory / "model.safetensors", threads), config)
    tensors: list[TensorDigest] = []
    for file_name, expected in _shards(index_path).items():
        found = tensor_digests(directory / file_name, threads)
        for name in sorted(expected ^ {tensor.name for tensor in found})[:1]:
            raise SafetensorsError(f"tensor {shown(name)} is in only one of {file_name} and {index_path.name}")
        tensors += found
    return model_digest_of(tensors, config)


def model_digest_of(tensors: Iterable[TensorDigest], config: Mapping[str, Any]) -> str:
    """The digest of a model from its tensors' parts and its config.json; raises as `adapter_digest` does."""
    return _weights_digest(_MODEL_DOMAIN, model_forward_config(config), tensors)


def graphs_digest(files: Mapping[str, str]) -> str:
    """The digest of a model that was turned into graphs: all of its files, SHA-256 by path; 64 hex digits.

    Raises:
        NotCanonicalError: a path without a canonical form, or a malformed digest.
    """
    for path, digest in files.items():
        digest_bytes(digest, f"SHA-256 of {shown(path)}")
    return hashlib.sha256(_GRAPHS_DOMAIN + canonical_json(dict(files))).hexdigest()


def _weights_digest(start: bytes, config: dict[str, Any], tensors: Iterable[TensorDigest]) -> str:
    parts = sorted(((utf8(tensor.name, "tensor's name"), tensor) for tensor in tensors), key=lambda part: part[0])
    digest = hashlib.sha256(start + sized(canonical_json(config)) + unsigned(len(parts), 8, "number of tensors"))
    previous: bytes | None = None
    for name, tensor in parts:
        if name == previous:
            raise DigestError(f"tensor {shown(tensor.name)} is there twice")
        previous = name
        digest.update(sized(name) + sized(utf8(tensor.dtype, "dtype")))
        digest.update(unsigned(len(tensor.shape), 4, "number of dimensions"))
        for dimension in tensor.shape:
            digest.update(unsigned(dimension, 8, "dimension"))
        digest.update(digest_bytes(tensor.sha256, "tensor's SHA-256"))
    return digest.hexdigest()


def _shards(index_path: Path) -> dict[str, set[str]]:
    """The names of the tensors that each file of an index holds."""
    file_by_tensor = _json_object(index_path).get("weight_map")
    if not isinstance(file_by_tensor, dict):
        raise SafetensorsError(f"{index_path.name}: weight_map must be an object, got {shown(file_by_tensor)}")
    tensors_by_file: dict[str, set[str]] = {}
    for tensor, file in file_by_tensor.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise SafetensorsError(f"{index_path.name}: {shown(file)} is not the name of a file beside it")
        tensors_by_file.setdefault(file, set()).add(tensor)
    return tensors_by_file


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except NotCanonicalError as error:
        raise NotCanonicalError(f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise NotCanonicalError(f"{path.name} must be a JSON object, got {shown(value)}")
    return value
