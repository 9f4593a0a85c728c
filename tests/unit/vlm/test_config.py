from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import ConfigError

# The published configuration of Qwen3-VL-2B-Instruct, as far as it is read here: the older rotary form.
FULL_SIZE = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "max_position_embeddings": 262144,
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
        "hidden_act": "gelu_pytorch_tanh",
    },
}


def changed(**changes: object) -> dict:
    """FULL_SIZE with changes; `text__x` changes `text_config.x`."""
    raw = copy.deepcopy(FULL_SIZE)
    for key, value in changes.items():
        section, _, field = key.rpartition("__")
        (raw[f"{section}_config"] if section else raw)[field] = value
    return raw


def test_both_rotary_forms_say_the_same() -> None:
    new_form = changed()
    text = new_form["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    config = ModelConfig.from_dict(FULL_SIZE)
    assert ModelConfig.from_dict(new_form) == config
    assert config.text.rope_theta == 5e6
    assert config.text.mrope_section == (24, 20, 20)
    assert config.vision.rope_theta == 1e4
    assert config.vision.patch_values == 1536


def test_the_head_may_be_tied_in_either_place_or_not_at_all() -> None:
    assert ModelConfig.from_dict(FULL_SIZE).tie_word_embeddings
    inner = changed(text__tie_word_embeddings=True)
    del inner["tie_word_embeddings"]
    assert ModelConfig.from_dict(inner).tie_word_embeddings
    assert not ModelConfig.from_dict(changed(tie_word_embeddings=False)).tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'"),
        ({"text_config": None}, "text_config is None"),
        ({"text__hidden_act": "relu"}, "text_config.hidden_act is 'relu'"),
        ({"text__attention_bias": True}, "text_config.attention_bias is True"),
        ({"text__hidden_size": 0}, "text_config.hidden_size is 0"),
        ({"text__num_hidden_layers": True}, "text_config.num_hidden_layers is True"),
        ({"text__num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"text__rope_scaling": {"rope_type": "yarn"}}, "text_config.rope_scaling.rope_type is 'yarn'"),
        (
            {"text__rope_scaling": {"mrope_interleaved": False}},
            "rope_scaling.mrope_interleaved is False",
        ),
        ({"text__rope_scaling": {"mrope_section": [1]}}, r"mrope_section is \[1\]"),
        ({"text__rope_scaling": {"mrope_section": [24, 30, 10]}}, r"mrope_section is \(24, 30, 10\)"),
        ({"text__rope_theta": float("nan")}, "text_config.rope_theta is nan"),
        ({"vision__hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu'"),
        ({"vision__patch_size": [16, 14]}, r"vision_config.patch_size is \[16, 14\]"),
        ({"vision__num_heads": 24}, "vision_config.hidden_size is 1024"),
        ({"vision__out_hidden_size": 3584}, "vision_config.out_hidden_size is 3584"),
        ({"vision__num_position_embeddings": 2300}, "num_position_embeddings is 2300"),
        ({"vision__deepstack_visual_indexes": [5, 24]}, r"deepstack_visual_indexes is \(5, 24\)"),
        ({"vision__deepstack_visual_indexes": [11, 5]}, r"deepstack_visual_indexes is \(11, 5\)"),
        ({"image_token_id": 151936}, "image_token_id is 151936"),
    ],
)
def test_what_cannot_be_honoured_is_named_with_its_value(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(changed(**changes))


def test_all_violations_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(changed(text__hidden_act="relu", vision__depth=-1, image_token_id="x"))
    assert len(error.value.violations) == 3


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json: "):
        ModelConfig.from_directory(tmp_path)


def test_a_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FULL_SIZE))
    assert ModelConfig.from_directory(tmp_path) == ModelConfig.from_dict(FULL_SIZE)
