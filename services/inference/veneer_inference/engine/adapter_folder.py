"""An adapter's folder, read and checked before anybody may wear it.

The folder is PEFT's, with `processing_contract.json` beside it: the contract is a part of the adapter's digest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from veneer_digests import DigestError, adapter_digest, contract_digest, tensor_digests
from veneer_inference.ports import EngineError
from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import RefusedError
from veneer_vlm.lora import Adapter
from veneer_vlm.peft_folder import CONFIG_FILE, TENSOR_FILE, read

CONTRACT_FILE = "processing_contract.json"

_T = TypeVar("_T")


def read_adapter(
    directory: Path, digest: str, model: ModelConfig, model_digest: str, max_rank: int, dtype: torch.dtype
) -> Adapter:
    """Reads a folder.

    Args:
        directory: the folder.
        digest: what it must hash to.
        model: the shape of the base.
        model_digest: the base that its contract must name.
        max_rank: greatest rank that is taken.
        dtype: of the factors to compute with.

    Raises:
        EngineError: `ADAPTER_INVALID` with everything that is wrong.
    """
    problems: list[str] = []
    adapter = None
    try:
        adapter = read(directory, model, dtype)
        if adapter.config.r > max_rank:
            problems.append(f"r is {adapter.config.r}, at most {max_rank} is served")
    except RefusedError as error:
        problems += error.violations
    contract = _object(directory / CONTRACT_FILE, problems)
    config = _object(directory / CONFIG_FILE, [])  # `read` has said what is wrong with it
    if contract is not None and contract.get("model_digest") != model_digest:
        problems.append(f"it was trained on base {contract.get('model_digest')!r}, this is {model_digest!r}")
    if contract is not None and config is not None:
        found = _digest(directory, config, contract, problems)
        if found not in (digest, None):
            problems.append(f"it hashes to {found}, not to {digest}")
    if adapter is None or problems:
        raise EngineError("ADAPTER_INVALID", problems)
    return adapter


def _digest(directory: Path, config: dict[str, Any], contract: dict[str, Any], problems: list[str]) -> str | None:
    return _tried(
        lambda: adapter_digest(tensor_digests(directory / TENSOR_FILE), config, contract_digest(contract)),
        "it has no digest",
        problems,
    )


def _object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    value: Any = _tried(lambda: json.loads(path.read_bytes()), f"{path.name} cannot be read", problems)
    if value is not None and not isinstance(value, dict):
        problems.append(f"{path.name} holds a JSON {type(value).__name__}, not an object")
        return None
    return value


def _tried(make: Callable[[], _T], failed: str, problems: list[str]) -> _T | None:
    try:
        return make()
    except (DigestError, OSError, ValueError, RecursionError) as error:
        problems.append(f"{failed}: {error}")
        return None
