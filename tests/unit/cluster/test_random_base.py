"""A base with random weights is one that the model's own loader takes."""

import copy
from pathlib import Path

import pytest

from veneer_cluster import base
from veneer_cluster.demo import random_base
from veneer_processing.model_directory import chat_template, pixel_settings
from veneer_vlm.config import ModelConfig
from veneer_vlm.layout import parameter_count
from veneer_vlm.weights import load


def test_the_published_shape_is_of_two_billion_parameters() -> None:
    assert parameter_count(ModelConfig.from_dict(random_base.FULL_SIZE)) == pytest.approx(2.13e9, rel=0.01)


def test_what_is_written_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = copy.deepcopy(random_base.FULL_SIZE)
    small["text_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 32,
    }
    small["text_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    small["text_config"]["rope_scaling"]["mrope_section"] = [8, 4, 4]
    small["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 2}
    small["vision_config"] |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]}
    monkeypatch.setattr(random_base, "FULL_SIZE", small)
    directory = tmp_path / "random"
    random_base.write(directory)
    model = load(directory)
    assert base.parameters(directory) == parameter_count(model.config)
    assert "<|im_start|>" in chat_template(directory)
    assert pixel_settings(directory).patch_size == 16
