from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from veneer_vlm import peft_folder
from veneer_vlm.errors import AdapterError
from veneer_vlm.lora import Adapter, AdapterBatch, AdapterConfig

if TYPE_CHECKING:
    from tests.unit.vlm.conftest import Row, Toy

# peft 0.21 reads an attribute that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CONFIG = AdapterConfig(
    r=4,
    lora_alpha=12,
    lora_dropout=0.05,
    target_modules=("v_proj", "q_proj", "merger.linear_fc2"),
    use_rslora=True,
)


@pytest.fixture
def adapter(toy: Toy) -> Adapter:
    adapter = Adapter.new(toy.config, CONFIG, seed=1)
    for number, pair in enumerate(adapter.pairs.values()):
        pair.b_O_R.normal_(0, 0.2, generator=torch.Generator().manual_seed(number))
    return adapter


@pytest.fixture
def folder(adapter: Adapter, tmp_path: Path) -> Path:
    peft_folder.write(adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, settings: dict[str, object] | None = None, **tensors: torch.Tensor | None) -> None:
    """Change settings of the configuration, and tensors by name (None removes)."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(settings or {})}))
    path = folder / "adapter_model.safetensors"
    content = load_file(path)
    for name, tensor in tensors.items():
        content.pop(name, None)
        if tensor is not None:
            content[name] = tensor
    save_file(content, path)


def test_what_is_written_is_read_back(toy: Toy, adapter: Adapter, folder: Path) -> None:
    again = peft_folder.read(folder, toy.config)
    assert again.config == adapter.config
    assert list(again.pairs) == list(adapter.pairs)
    for (name, tensor), (_, same) in zip(adapter.tensors(), again.tensors(), strict=True):
        assert torch.equal(tensor, same), name
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["merger.linear_fc2", "q_proj", "v_proj"]


def test_peft_loads_what_we_write(toy: Toy, rows: list[Row], adapter: Adapter, folder: Path) -> None:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(toy.peer), folder).eval()
    row = rows[1]
    (logits,) = toy.logits(
        [row],
        AdapterBatch.uniform(adapter, len(row.ids_T)),
        AdapterBatch.uniform(adapter, len(row.patches_P_X)),
    )
    assert_close(logits, toy.peer_logits(row, model), rtol=0, atol=1e-4)


def test_we_load_what_peft_writes(toy: Toy, rows: list[Row], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up_proj", "qkv"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(toy.peer), config).eval()
    model.save_pretrained(tmp_path)
    adapter = peft_folder.read(tmp_path, toy.config)
    row = rows[2]
    (logits,) = toy.logits(
        [row],
        AdapterBatch.uniform(adapter, len(row.ids_T)),
        AdapterBatch.uniform(adapter, len(row.patches_P_X)),
    )
    assert_close(logits, toy.peer_logits(row, model), rtol=0, atol=1e-4)


def test_an_adapter_may_be_read_into_another_dtype(toy: Toy, folder: Path) -> None:
    adapter = peft_folder.read(folder, toy.config, torch.bfloat16)
    assert {tensor.dtype for _, tensor in adapter.tensors()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"layers_to_transform": [0]}, "layers_to_transform is"),
        ({"a_later_invention": 1}, "a_later_invention is 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"target_modules": ".*"}, r"target_modules is '\.\*'"),
        ({"target_modules": []}, r"target_modules is \[\]"),
        ({"target_modules": ["nothing"]}, "'nothing' names nothing"),
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ],
)
def test_settings_without_a_counterpart_are_refused_by_name(
    toy: Toy, folder: Path, settings: dict[str, object], message: str
) -> None:
    rewrite(folder, settings)
    with pytest.raises(AdapterError, match=message):
        peft_folder.read(folder, toy.config)


def test_every_objection_comes_at_once(toy: Toy, folder: Path) -> None:
    q = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.lora_{}.weight"
    rewrite(
        folder,
        {"use_dora": True, "modules_to_save": ["norm"]},
        **{
            q.format(0, "A"): torch.full((4, 64), float("nan")),
            q.format(0, "B"): torch.ones(64, 5),
            q.format(1, "A"): None,
            q.format(1, "B"): torch.ones(64, 4, dtype=torch.int8),
            "base_model.model.other.lora_A.weight": torch.ones(1),
        },
    )
    with pytest.raises(AdapterError) as error:
        peft_folder.read(folder, toy.config)
    assert sorted(error.value.violations) == sorted(
        [
            "use_dora is True, which is not supported",
            "modules_to_save is ['norm'], which is not supported",
            f"tensor {q.format(0, 'A')} holds a value that is not finite",
            f"tensor {q.format(0, 'B')} has shape (64, 5), (64, 4) is needed",
            f"tensor {q.format(1, 'A')} is missing",
            f"tensor {q.format(1, 'B')} is torch.int8, a float of 16 or 32 bits is needed",
            "tensor base_model.model.other.lora_A.weight is unknown",
        ]
    )


def test_a_rank_unlike_the_configurations_is_refused(toy: Toy, folder: Path) -> None:
    rewrite(folder, {"r": 8})
    with pytest.raises(AdapterError, match=r"has shape \(4, 64\), \(8, 64\) is needed"):
        peft_folder.read(folder, toy.config)


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 8 + b"{}", b"\x80\x04K\x01."])
def test_a_file_that_is_no_safetensors_is_refused(toy: Toy, folder: Path, content: bytes | None) -> None:
    path = folder / "adapter_model.safetensors"
    path.unlink()
    if content is None:
        (folder / "adapter_model.bin").write_bytes(b"pickle")
    else:
        path.write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
        peft_folder.read(folder, toy.config)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_configuration_that_is_no_object_is_refused(toy: Toy, folder: Path, content: str) -> None:
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json: "):
        peft_folder.read(folder, toy.config)
