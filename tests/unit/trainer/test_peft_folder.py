"""PEFT folders as they arrive: what the forward pass could not honour is refused, each thing by its own sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer_processing import ProcessingContract
from veneer_rpc.errors import FailedPrecondition
from veneer_rpc.names import ModelName
from veneer_trainer.adapters.peft_folder import inspect
from veneer_trainer.domain.jobs import Contract
from veneer_trainer.domain.targets import Linear
from veneer_trainer.ports import BaseModel

PREFIX = "base_model.model."
LINEARS = {
    f"model.layers.{layer}.{name}": Linear("decoder", 6, 4) for layer in (0, 1) for name in ("q_proj", "xq_proj")
}
FIRST = f"{PREFIX}model.layers.0.q_proj.lora_A.weight"
BASE = BaseModel(ModelName("tiny"), "ab" * 32, 512, 65_536, LINEARS)
SEALED = ProcessingContract(
    model_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    template_digest="ef" * 32,
    min_pixels=4096,
    max_pixels=65_536,
    patch_size=16,
    merge_size=2,
    temporal_patch_size=2,
    interpolation="bicubic-antialias",
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    picture_rule="1",
    mask_rule="1",
)
CONTRACT = Contract(SEALED.digest, **SEALED.to_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in (0, 1):
        name = f"{PREFIX}model.layers.{layer}.q_proj"
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(6, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def settings(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(act: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        act(held)
        save_file(held, folder / "adapter_model.safetensors")

    return change


def contract(folder: Path) -> None:
    other = replace(SEALED, max_pixels=131_072)
    (folder / "processing_contract.json").write_text(json.dumps(other.to_dict()))


def test_a_good_folder_is_known_by_whole_names_and_gets_its_contract(folder: Path) -> None:
    found = inspect(folder, BASE, CONTRACT)
    assert found.target_modules == ("model.layers.0.q_proj", "model.layers.1.q_proj")  # and not what ends alike
    assert (found.lora.rank, found.lora.alpha, found.contract) == (2, 4.0, CONTRACT)
    assert [file.path for file in found.files][-1] == "processing_contract.json"
    assert inspect(folder, BASE, CONTRACT).digest == found.digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (tensors(lambda held: held.pop(FIRST)), f"tensor {FIRST} is missing"),
        (tensors(lambda held: held.update(strange=torch.ones(1))), "tensor strange is unknown"),
        (tensors(lambda held: held.update({FIRST: torch.ones(4, 2)})), "has shape (4, 2), (2, 4) is needed"),
        (tensors(lambda held: held.update({FIRST: torch.ones(2, 4, dtype=torch.float64)})), "is F64, one of F32"),
        (tensors(lambda held: held[FIRST].fill_(torch.inf)), "holds a value that is not finite"),
        *(
            (
                tensors(lambda held, dtype=dtype: held.update({FIRST: torch.full((2, 4), torch.nan, dtype=dtype)})),
                "holds a value that is not finite",
            )
            for dtype in (torch.float16, torch.bfloat16)
        ),
        (settings(r=0), "r must be a number from 1"),
        (settings(r=2.5), "r must be a whole number"),
        (settings(r=True), "r must be a number"),
        (settings(r=3), "has shape (2, 4), (3, 4) is needed"),
        (settings(lora_alpha="4"), "lora_alpha must be a number"),
        (settings(peft_type="IA3"), "peft_type is 'IA3'"),
        (settings(bias="all"), "bias is 'all'"),
        (settings(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changes the base"),
        (settings(use_dora=True), "use_dora is set"),
        (settings(target_modules=["q_proj", "z_proj"]), "target module 'z_proj' matches no linear"),
        (settings(target_modules="all-linear"), "target_modules must be a list"),
        (contract, "is another contract: max_pixels is 131072, not 65536"),
    ],
)
def test_what_does_not_fit_is_told(folder: Path, change: Callable[[Path], None], said: str) -> None:
    change(folder)
    with pytest.raises(FailedPrecondition) as refused:
        inspect(folder, BASE, CONTRACT)
    assert refused.value.reason == "ADAPTER_UNFIT"
    assert said in refused.value.message


def test_everything_is_told_at_once(folder: Path) -> None:
    settings(bias="all", use_dora=True)(folder)
    tensors(lambda held: held.pop(FIRST))(folder)
    with pytest.raises(FailedPrecondition) as refused:
        inspect(folder, BASE, CONTRACT)
    assert refused.value.metadata["objections"] == "3"
