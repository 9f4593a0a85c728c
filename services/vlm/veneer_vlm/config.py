"""The shape of a model, read from its `config.json`.

Owns which fields the forward pass reads and which values it can honour. Imports no torch, so that a service
without it can reason about a base. It knows nothing of weights.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer_vlm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder's shape."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower's shape."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    rope_theta: float
    deepstack_visual_indexes: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """X: how many values a flattened patch has."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Width of `spatial_merge_size`² neighbouring patches side by side."""
        return self.hidden_size * self.spatial_merge_size**2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A dense Qwen3-VL: its decoder, its tower and how they meet."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    tie_word_embeddings: bool

    @classmethod
    def from_directory(cls, directory: Path) -> "ModelConfig":
        """Read `config.json` of a model directory.

        Raises:
            ConfigError: the file is missing or no JSON object, or `from_dict` refuses it.
        """
        path = directory / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(str(path), [f"cannot be read: {error}"]) from error
        if not isinstance(raw, dict):
            raise ConfigError(str(path), [f"holds a JSON {type(raw).__name__}, not an object"])
        return cls.from_dict(raw, place=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], place: str = "config.json") -> "ModelConfig":
        """Check a parsed `config.json` and keep what the forward pass reads.

        Takes the text rotary settings in both forms in use: `rope_parameters`, or `rope_scaling` beside
        `rope_theta`.

        Raises:
            ConfigError: with every violation found, each naming key and value.
        """
        violations: list[str] = []
        if raw.get("model_type") != "qwen3_vl":
            # Nothing else can be said about the fields of another architecture.
            raise ConfigError(place, [f"model_type is {raw.get('model_type')!r}, only 'qwen3_vl' is supported"])
        text = _Section(raw, "text_config", violations)
        vision = _Section(raw, "vision_config", violations)
        config = cls(
            text=_text(text),
            vision=_vision(vision),
            image_token_id=_Section({"": raw}, "", violations).integer("image_token_id"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", text.values.get("tie_word_embeddings", False))),
        )
        if not violations:
            violations += _contradictions(config)
        if violations:
            raise ConfigError(place, violations)
        return config


class _Section:
    """Typed reads from one object of the file; what is wrong goes to `violations`."""

    def __init__(self, raw: Mapping[str, Any], key: str, violations: list[str]) -> None:
        self.prefix = f"{key}." if key else ""
        self.violations = violations
        self.values: Mapping[str, Any] = {}
        if isinstance(raw.get(key), Mapping):
            self.values = raw[key]
        else:
            violations.append(f"{key} is {raw.get(key)!r}, an object is needed")

    def refuse(self, key: str, need: str) -> None:
        self.violations.append(f"{self.prefix}{key} is {self.values.get(key)!r}, {need}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]  # patch sizes may be written once for each axis
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(key, "a positive whole number is needed")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            self.refuse(key, "a positive number is needed")
            return 1.0
        return float(value)

    def integers(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        value = self.values.get(key, default)
        if not isinstance(value, (list, tuple)) or not all(type(item) is int and item >= 0 for item in value):
            self.refuse(key, "a list of whole numbers is needed")
            return ()
        return tuple(value)

    def only(self, key: str, allowed: object) -> None:
        """Demand a value that the forward pass has built in, where the key is present."""
        if self.values.get(key, allowed) != allowed:
            self.refuse(key, f"only {allowed!r} is supported")


def _rope(section: _Section, kinds: tuple[str, ...], default_theta: float) -> tuple[_Section, float]:
    """The rotary settings: the new `rope_parameters`, or the older `rope_scaling` beside `rope_theta`."""
    key = "rope_parameters" if section.values.get("rope_parameters") else "rope_scaling"
    rope = _Section({key: section.values.get(key) or {}}, key, section.violations)
    rope.prefix = section.prefix + rope.prefix
    for kind in ("rope_type", "type"):
        if rope.values.get(kind, kinds[0]) not in kinds:
            rope.refuse(kind, f"only {kinds[0]!r} is supported")
    return rope, (rope if "rope_theta" in rope.values else section).number("rope_theta", default_theta)


def _text(section: _Section) -> TextConfig:
    section.only("hidden_act", "silu")
    section.only("attention_bias", False)
    section.only("attention_dropout", 0.0)
    rope, rope_theta = _rope(section, ("default",), default_theta=500_000.0)
    rope.only("mrope_interleaved", True)
    heads = section.integer("num_attention_heads")
    mrope_section = rope.integers("mrope_section", (24, 20, 20))
    if len(mrope_section) != 3:
        rope.refuse("mrope_section", "three numbers are needed")
        mrope_section = (1, 1, 1)
    return TextConfig(
        vocab_size=section.integer("vocab_size"),
        hidden_size=section.integer("hidden_size"),
        intermediate_size=section.integer("intermediate_size"),
        num_hidden_layers=section.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=section.integer("num_key_value_heads", heads),
        head_dim=section.integer("head_dim", 128),
        rms_norm_eps=section.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        mrope_section=(mrope_section[0], mrope_section[1], mrope_section[2]),
        max_position_embeddings=section.integer("max_position_embeddings", 128_000),
    )


def _vision(section: _Section) -> VisionConfig:
    section.only("hidden_act", "gelu_pytorch_tanh")
    _, rope_theta = _rope(section, ("axial", "default"), default_theta=10_000.0)
    return VisionConfig(
        depth=section.integer("depth"),
        hidden_size=section.integer("hidden_size"),
        intermediate_size=section.integer("intermediate_size"),
        num_heads=section.integer("num_heads"),
        in_channels=section.integer("in_channels", 3),
        patch_size=section.integer("patch_size", 16),
        temporal_patch_size=section.integer("temporal_patch_size", 2),
        spatial_merge_size=section.integer("spatial_merge_size", 2),
        out_hidden_size=section.integer("out_hidden_size"),
        num_position_embeddings=section.integer("num_position_embeddings", 2304),
        rope_theta=rope_theta,
        deepstack_visual_indexes=section.integers("deepstack_visual_indexes"),
    )


def _contradictions(config: ModelConfig) -> list[str]:
    """What each field alone cannot show."""
    text, vision = config.text, config.vision
    half = text.head_dim // 2
    deepstack = vision.deepstack_visual_indexes
    checks = {
        f"text_config.num_attention_heads is {text.num_attention_heads}, "
        f"no multiple of num_key_value_heads {text.num_key_value_heads}": (
            text.num_attention_heads % text.num_key_value_heads == 0
        ),
        f"text_config.head_dim is {text.head_dim}, an even number is needed": text.head_dim % 2 == 0,
        f"text_config.mrope_section is {text.mrope_section}, a sum of head_dim / 2 = "
        f"{half} is needed, and a second and third of at most a third of it": sum(text.mrope_section) == half
        and 3 * max(text.mrope_section[1:]) <= half,
        f"vision_config.hidden_size is {vision.hidden_size}, "
        f"a multiple of 4 x num_heads {vision.num_heads} is needed": (vision.hidden_size % (4 * vision.num_heads) == 0),
        f"vision_config.out_hidden_size is {vision.out_hidden_size}, "
        f"text_config.hidden_size {text.hidden_size} is needed": vision.out_hidden_size == text.hidden_size,
        f"vision_config.num_position_embeddings is {vision.num_position_embeddings}, a square is needed": (
            math.isqrt(vision.num_position_embeddings) ** 2 == vision.num_position_embeddings
        ),
        f"vision_config.deepstack_visual_indexes is {deepstack}, growing layers below depth "
        f"{vision.depth}, at most num_hidden_layers {text.num_hidden_layers} of them, are needed": (
            list(deepstack) == sorted(set(deepstack))
            and all(index < vision.depth for index in deepstack)
            and len(deepstack) <= text.num_hidden_layers
        ),
        f"image_token_id is {config.image_token_id}, below vocab_size {text.vocab_size} is needed": (
            config.image_token_id < text.vocab_size
        ),
    }
    return [message for message, holds in checks.items() if not holds]
