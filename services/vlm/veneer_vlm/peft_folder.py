"""An adapter as a PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.

Owns reading, with every objection to a foreign folder named at once, and writing what
`PeftModel.from_pretrained` loads. Settings of PEFT that the forward pass does not have are refused by their
name, never passed over.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import AdapterError, TargetError
from veneer_vlm.layout import Shape, target_linears
from veneer_vlm.lora import Adapter, AdapterConfig, LowRankPair

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

_READ = {field.name for field in dataclasses.fields(AdapterConfig)}
# They say where an adapter came from, or steer features that are off unless another key, refused below, turns
# them on.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
_FIXED = {"peft_type": ("LORA",), "bias": ("none",)}
# The initialisations that leave the base's weights alone; others (PiSSA, OLoRA, LoftQ, ...) belong to a
# changed base.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def write(adapter: Adapter, directory: Path) -> None:
    """Write a PEFT folder; `directory` is made where it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        **dataclasses.asdict(adapter.config),
        "peft_type": "LORA",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    tensors = {KEY_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors()}
    save_file(tensors, directory / TENSOR_FILE, metadata={"format": "pt"})


def read(
    directory: Path,
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Adapter:
    """Read a PEFT folder and check it against the base it is to sit on.

    Raises:
        AdapterError: with all objections: settings without a counterpart here, tensors missing, unknown, of a
            wrong shape or dtype, or not finite.
    """
    violations: list[str] = []
    config = _config(_json_object(directory / CONFIG_FILE), violations)
    expected: dict[str, Shape] = {}
    try:
        for name, (outputs, inputs) in target_linears(model, config.target_modules).items():
            expected[f"{KEY_PREFIX}{name}.lora_A.weight"] = (config.r, inputs)
            expected[f"{KEY_PREFIX}{name}.lora_B.weight"] = (outputs, config.r)
    except TargetError as error:
        violations += error.violations
    if violations and not expected:
        raise AdapterError(str(directory), violations)
    tensors = _tensors(directory / TENSOR_FILE, expected, violations)
    if violations:
        raise AdapterError(str(directory), violations)
    names = dict.fromkeys(key.removeprefix(KEY_PREFIX).rsplit(".", 2)[0] for key in expected)
    pairs = {
        name: LowRankPair(
            tensors[f"{KEY_PREFIX}{name}.lora_A.weight"].to(device, dtype),
            tensors[f"{KEY_PREFIX}{name}.lora_B.weight"].to(device, dtype),
        )
        for name in names
    }
    return Adapter(config, pairs)


def _json_object(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(str(path), [f"cannot be read: {error}"]) from error
    if not isinstance(raw, dict):
        raise AdapterError(str(path), [f"holds a JSON {type(raw).__name__}, not an object"])
    return raw


def _config(raw: Mapping[str, Any], violations: list[str]) -> AdapterConfig:
    """What the forward pass reads; what it could not honour goes to `violations`."""
    for key, allowed in _FIXED.items():
        if raw.get(key) not in allowed:
            violations.append(f"{key} is {raw.get(key)!r}, only {allowed[0]!r} is supported")
    if raw.get("init_lora_weights", True) not in _INITIALISATIONS:
        violations.append(f"init_lora_weights is {raw['init_lora_weights']!r}, which changes the base's weights")
    for key in sorted(raw.keys() - _READ - _WITHOUT_EFFECT - _FIXED.keys() - {"init_lora_weights"}):
        if raw[key]:
            violations.append(f"{key} is {raw[key]!r}, which is not supported")

    def number(key: str, default: float, low: float, high: float) -> float:
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
            violations.append(f"{key} is {value!r}, a number from {low} to below {high} is needed")
            return default
        return value

    rank = number("r", 8, 1, 2**31)
    if rank != int(rank):
        violations.append(f"r is {rank!r}, a whole number is needed")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        violations.append(f"target_modules is {targets!r}, a list of module names is needed")
        targets = []
    base_name = raw.get("base_model_name_or_path")
    return AdapterConfig(
        r=int(rank),
        lora_alpha=number("lora_alpha", 8, 0, math.inf),
        lora_dropout=number("lora_dropout", 0.0, 0, 1),
        target_modules=tuple(targets),
        use_rslora=bool(raw.get("use_rslora", False)),
        base_model_name_or_path=base_name if isinstance(base_name, str) else None,
    )


def _tensors(path: Path, expected: Mapping[str, Shape], violations: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of the file that are as expected; the rest goes to `violations`."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            violations += [f"tensor {key} is unknown" for key in sorted(found - expected.keys())]
            violations += [f"tensor {key} is missing" for key in expected if key not in found]
            for key, shape in expected.items():
                if key not in found:
                    continue
                tensor = file.get_tensor(key)
                if tuple(tensor.shape) != shape:
                    violations.append(f"tensor {key} has shape {tuple(tensor.shape)}, {shape} is needed")
                elif tensor.dtype not in _DTYPES:
                    violations.append(f"tensor {key} is {tensor.dtype}, a float of 16 or 32 bits is needed")
                elif not tensor.isfinite().all():
                    violations.append(f"tensor {key} holds a value that is not finite")
                tensors[key] = tensor
    except (OSError, SafetensorError) as error:
        violations.append(f"{path.name} cannot be read: {error}")
    return tensors
