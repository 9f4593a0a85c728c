"""A PEFT folder as it arrives: read and checked against its base, without torch.

What the forward pass could not honour is refused, and all of it is told at once; the digest is computed from the
files themselves. Its processing contract lies beside it in `processing_contract.json`, the fields of
`veneer_processing.ProcessingContract` as JSON.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from veneer_digests import (
    DigestError,
    SafetensorsError,
    TensorSlot,
    adapter_digest,
    parse_json,
    read_safetensors_header,
    read_slot,
    tensor_digests,
)
from veneer_processing import ProcessingContract, ProcessingError
from veneer_rpc.errors import FailedPrecondition, Violation, invalid
from veneer_trainer.adapters.received_files import room_on_disk
from veneer_trainer.domain.adapters import Inspected
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Contract
from veneer_trainer.domain.spec import Lora
from veneer_trainer.domain.targets import Linear
from veneer_trainer.ports import BaseModel

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CONTRACT_FILE = "processing_contract.json"
ALLOWED_FILES = frozenset({CONFIG_FILE, TENSOR_FILE, CONTRACT_FILE, "README.md"})

_PREFIX = "base_model.model."
_MAX_JSON_BYTES = 1 << 20
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BF16_EXPONENT = 0x7F80
# Switches of PEFT with another forward pass than plain LoRA; at rest they do not matter.
_SWITCHES = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "exclude_modules", "fan_in_fan_out",
    "layer_replication", "layers_pattern", "layers_to_transform", "lora_bias", "loftq_config",
    "modules_to_save", "rank_pattern", "target_parameters", "trainable_token_indices", "use_dora", "use_qalora",
)  # fmt: skip
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
_SHOWN = 20


def inspect(folder: Path, base: BaseModel, contract: Contract) -> Inspected:
    """Reads and checks a PEFT folder, and seals the contract in it where it is not; see `AdapterFolders.inspect`."""
    _check_files(folder)
    found: list[str] = []
    config = _object(folder / CONFIG_FILE, found)
    lora, names = _settings(config, found)
    targets = _targets(base.linears, names, found)
    _check_tensors(folder / TENSOR_FILE, _expected(targets, lora.rank), found)
    _check_contract(folder / CONTRACT_FILE, contract, found)
    if found:
        raise unfit(base, found)
    try:
        digest = adapter_digest(tensor_digests(folder / TENSOR_FILE), config, contract.digest)
    except DigestError as error:
        raise unfit(base, [str(error)]) from error
    if not (folder / CONTRACT_FILE).exists():
        _seal(folder / CONTRACT_FILE, contract)
    files = tuple(_stored(folder / name) for name in sorted(each.name for each in folder.iterdir()))
    size_bytes = sum(slot.size_bytes for slot in read_safetensors_header(folder / TENSOR_FILE).slots.values())
    return Inspected(digest, contract, lora, tuple(sorted(targets)), size_bytes, files)


def unfit(base: BaseModel, objections: list[str]) -> FailedPrecondition:
    """Returns the refusal of an adapter, with every objection (the first twenty in words)."""
    text = "; ".join(objections[:_SHOWN])
    more = f"; and {len(objections) - _SHOWN} more" if len(objections) > _SHOWN else ""
    return FailedPrecondition(
        "ADAPTER_UNFIT",
        f"the adapter does not fit {base.name}: {text}{more}",
        metadata={"objections": str(len(objections))},
        resource=str(base.name),
    )


def _check_files(folder: Path) -> None:
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    found = [
        Violation("header.files", "FILE_MISSING", f"{name} is missing")
        for name in (CONFIG_FILE, TENSOR_FILE)
        if name not in present
    ]
    for name in sorted(present - ALLOWED_FILES):
        text = f"{name[:80]!r} does not belong into a PEFT folder; {', '.join(sorted(ALLOWED_FILES))} do"
        found.append(Violation("header.files", "FILE_FOREIGN", text))
    if found:
        raise invalid(*found)


def _object(path: Path, found: list[str]) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        found.append(f"{path.name} has more than {_MAX_JSON_BYTES} bytes")
        return {}
    try:
        value = parse_json(path.read_bytes())
    except DigestError as error:
        found.append(f"{path.name}: {error}")
        return {}
    if isinstance(value, dict):
        return value
    found.append(f"{path.name} must hold a JSON object")
    return {}


def _settings(config: Mapping[str, Any], found: list[str]) -> tuple[Lora, tuple[str, ...]]:
    """What the forward pass reads, and the target names."""
    for key, only in (("peft_type", "LORA"), ("bias", "none")):
        if config.get(key, "none" if key == "bias" else None) != only:
            found.append(f"{key} is {str(config.get(key))[:40]!r}, only {only!r} is supported")
    if config.get("init_lora_weights", True) not in _INITIALISATIONS:
        found.append(f"init_lora_weights is {str(config['init_lora_weights'])[:40]!r}, which changes the base")
    found += [f"{key} is set, which is not supported" for key in _SWITCHES if config.get(key)]

    def number(key: str, default: float, low: float, high: float) -> float:
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
            found.append(f"{key} must be a number from {low:g} to below {high:g}, was {str(value)[:40]}")
            return default
        return value

    rank = number("r", 8, 1, 2**20)
    if rank != int(rank):
        found.append(f"r must be a whole number, was {rank}")
    names = config.get("target_modules")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        found.append(f"target_modules must be a list of module names, was {str(names)[:40]}")
        names = []
    lora = Lora(
        int(rank),
        float(number("lora_alpha", 8, 0, math.inf)),
        float(number("lora_dropout", 0.0, 0, 1)),
        tuple(sorted(set(names))),
        config.get("use_rslora") is True,
    )
    return lora, lora.target_modules


def _targets(linears: Mapping[str, Linear], names: tuple[str, ...], found: list[str]) -> dict[str, Linear]:
    """The linears that names select by PEFT's rule: a whole name, or its end after a dot."""
    targets: dict[str, Linear] = {}
    for name in names:
        matches = {key: linear for key, linear in linears.items() if key == name or key.endswith(f".{name}")}
        if not matches:
            found.append(f"target module {name[:80]!r} matches no linear of the base")
        targets |= matches
    return targets


def _expected(targets: Mapping[str, Linear], rank: int) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for name, linear in targets.items():
        shapes[f"{_PREFIX}{name}.lora_A.weight"] = (rank, linear.inputs)
        shapes[f"{_PREFIX}{name}.lora_B.weight"] = (linear.outputs, rank)
    return shapes


def _check_tensors(path: Path, expected: Mapping[str, tuple[int, int]], found: list[str]) -> None:
    try:
        slots = read_safetensors_header(path).slots
    except SafetensorsError as error:
        found.append(f"{path.name}: {error}")
        return
    if expected:
        found += [f"tensor {name[:120]} is unknown" for name in sorted(slots.keys() - expected.keys())]
        found += [f"tensor {name} is missing" for name in sorted(expected.keys() - slots.keys())]
    with path.open("rb") as file:
        for name in sorted(slots.keys() & expected.keys()):
            slot = slots[name]
            if slot.shape != expected[name]:
                found.append(f"tensor {name} has shape {slot.shape}, {expected[name]} is needed")
            elif slot.dtype not in _DTYPES:
                found.append(f"tensor {name} is {slot.dtype}, one of {', '.join(_DTYPES)} is needed")
            elif not _finite(file.fileno(), slot):
                found.append(f"tensor {name} holds a value that is not finite")


def _finite(descriptor: int, slot: TensorSlot) -> bool:
    for piece in read_slot(descriptor, slot):
        values = np.frombuffer(piece, np.dtype(_DTYPES[slot.dtype]))
        finite = values & _BF16_EXPONENT != _BF16_EXPONENT if slot.dtype == "BF16" else np.isfinite(values)
        if not finite.all():
            return False
    return True


def _check_contract(path: Path, contract: Contract, found: list[str]) -> None:
    if not path.exists():
        return
    values = _object(path, found)
    try:
        sealed = ProcessingContract.from_dict(values)
    except ProcessingError as error:
        found.append(f"{path.name}: {error}")
        return
    if sealed.digest != contract.digest:
        differences = [
            f"{field.name} is {getattr(sealed, field.name)!r}, not {getattr(contract, field.name)!r}"
            for field in fields(ProcessingContract)
            if getattr(sealed, field.name) != getattr(contract, field.name)
        ]
        found.append(f"{path.name} is another contract: {', '.join(differences)}"[:500])


def _seal(path: Path, contract: Contract) -> None:
    values = {field.name: getattr(contract, field.name) for field in fields(ProcessingContract)}
    with room_on_disk("the contract"), path.open("wb") as file:
        file.write(msgspec.json.encode(values))
        file.flush()
        os.fsync(file.fileno())


def _stored(path: Path) -> StoredFile:
    with path.open("rb") as file:
        return StoredFile(path.name, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
