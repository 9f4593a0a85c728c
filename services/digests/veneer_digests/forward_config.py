"""Which parts of a config count for a digest: those that the forward pass of inference reads.

A member that nobody has thought of counts, and is never skipped: two equal adapters may then bear different
digests, but no two that answer differently the same.
"""

from collections.abc import Mapping
from typing import Any

from veneer_digests.errors import NotCanonicalError, shown
from veneer_digests.preimage import utf8

ADAPTER_UNREAD = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "revision",
        "task_type",
    }
)
"""Members of PEFT's adapter_config.json that do not count."""

MODEL_UNREAD = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Members of config.json, its text_config and its vision_config that do not count."""

# These only set where training starts; others (pissa, olora, corda, loftq) rewrite the base's weight on load.
_STARTS_ONLY = ("gaussian", "eva", "orthogonal")
_SETS = ("exclude_modules", "modules_to_save", "target_modules")


def adapter_forward_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of PEFT's adapter_config.json an adapter's digest counts (protos/DIGESTS.md, "Adapter").

    Raises:
        NotCanonicalError: r or lora_alpha is no number, or a list of modules holds what is no string.
    """
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float) or isinstance(config[name], bool):
            raise NotCanonicalError(f"$.{name} must be a number, got {shown(config.get(name))}")
    read = {
        name: value
        for name, value in config.items()
        if name not in ADAPTER_UNREAD and value is not None and value is not False and value not in ([], {})
    }
    if read.get("bias") == "none":
        del read["bias"]
    if read.get("init_lora_weights") is True or read.get("init_lora_weights") in _STARTS_ONLY:
        del read["init_lora_weights"]
    if read.get("use_qalora") is not True:
        read.pop("qalora_group_size", None)
    for name in _SETS:
        if isinstance(read.get(name), list):
            by_bytes = {utf8(module, f"$.{name}[{index}]"): module for index, module in enumerate(read[name])}
            read[name] = [by_bytes[key] for key in sorted(by_bytes)]
    return read


def model_forward_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of config.json a model's digest counts: all but `MODEL_UNREAD` and null, in it and its parts."""
    read = _without_unread(config)
    for part in ("text_config", "vision_config"):
        if isinstance(read.get(part), dict):
            read[part] = _without_unread(read[part])
    return read


def _without_unread(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in MODEL_UNREAD and value is not None}
