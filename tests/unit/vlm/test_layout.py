from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import TargetError
from veneer_vlm.layout import (
    adaptable_linears,
    adapter_size,
    parameter_count,
    target_linears,
    tensor_shapes,
)

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Toy

TEXT = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
VISION = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048,
    "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
FULL_SIZE = ModelConfig.from_dict(
    {
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "tie_word_embeddings": True,
        "text_config": TEXT,
        "vision_config": VISION,
    }
)


def test_tensors_are_the_peers_by_name_and_shape(toy: Toy, tied_toy: Toy) -> None:
    for model in (toy, tied_toy):
        expected = {name: tuple(tensor.shape) for name, tensor in model.peer.state_dict().items()}
        if model.config.tie_word_embeddings:
            del expected["lm_head.weight"]
        assert tensor_shapes(model.config) == expected


def test_the_full_size_has_its_published_counts() -> None:
    assert round(parameter_count(FULL_SIZE) / 1e9, 2) == 2.13
    assert adapter_size(target_linears(FULL_SIZE, ["q_proj", "v_proj"]), rank=8) == 1_605_632


def test_targets_follow_pefts_rule(toy: Toy) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    for targets in (
        ["q_proj", "v_proj"],
        ["linear_fc1"],
        ["attn.proj"],
        ["merger.linear_fc2", "down_proj"],
        ["model.language_model.layers.1.mlp.up_proj"],
        ["deepstack_merger_list.1.linear_fc1", "qkv"],
    ):
        peft = LoraConfig(target_modules=targets)
        expected = [name for name in adaptable_linears(toy.config) if check_target_module_exists(peft, name)]
        assert list(target_linears(toy.config, targets)) == expected
        assert expected


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "'q_prj' names nothing"),
        (".*", "names nothing"),
        ("proj", "selects model.visual.patch_embed.proj, which is not an adaptable linear"),
        ("lm_head", "selects lm_head"),
        ("embed_tokens", "not an adaptable linear"),
        ("mlp", "not an adaptable linear"),
        ("norm1", "not an adaptable linear"),
        ("", "names nothing"),
    ],
)
def test_targets_without_a_linear_are_refused(toy: Toy, target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        target_linears(toy.config, ["q_proj", target])


def test_every_wrong_target_is_named(toy: Toy) -> None:
    with pytest.raises(TargetError) as error:
        target_linears(toy.config, ["a", "q_proj", "lm_head"])
    assert len(error.value.violations) == 2


def test_shapes_can_be_had_without_torch() -> None:
    code = "import sys, json, veneer_vlm.layout; print(json.dumps('torch' in sys.modules))"
    assert not json.loads(subprocess.check_output([sys.executable, "-c", code]))
