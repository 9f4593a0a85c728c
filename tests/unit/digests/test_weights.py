import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from veneer_digests import (
    DigestError,
    NotCanonicalError,
    SafetensorsError,
    TensorDigest,
    adapter_digest,
    blob_digest,
    contract_digest,
    model_digest,
    model_digest_of,
    tensor_digest,
    tensor_digests,
    weights,
)

CONTRACT = contract_digest({"max_pixels": 200704})
PEFT: dict[str, Any] = {
    "alpha_pattern": {},
    "bias": "none",
    "init_lora_weights": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_modules": ["v_proj", "q_proj"],
    "use_dora": False,
    "use_rslora": False,
}
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {"rms_norm_eps": 1e-6, "rope_theta": 5000000, "use_cache": True},
    "tie_word_embeddings": True,
    "vision_config": {"deepstack_visual_indexes": [5, 11, 17]},
}
ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([1.5, -2], np.float16),
    "é": np.array(7, np.int64),
}
TENSORS = [
    tensor_digest("b", "F32", (2, 3), ARRAYS["b"].tobytes()),
    tensor_digest("a", "F16", (2,), ARRAYS["a"].tobytes()),
    tensor_digest("é", "I64", (), ARRAYS["é"].tobytes()),
]
# Names and shapes that would run into one another without their lengths.
DRAWN_TENSORS = st.lists(
    st.builds(
        TensorDigest,
        st.sampled_from(["a", "aa", "b", ""]),
        st.sampled_from(["U8", "I8"]),
        st.sampled_from([(), (1,), (1, 1)]),
        st.sampled_from([blob_digest(b"\0"), blob_digest(b"\1")]),
    ),
    max_size=3,
    unique_by=lambda tensor: tensor.name,
)


def test_the_bytes_are_those_of_the_page() -> None:
    config = b'{"lora_alpha":16,"peft_type":"LORA","r":8,"target_modules":["q_proj","v_proj"]}'
    preimage = b"veneer.adapter.v1\0" + bytes.fromhex(CONTRACT) + struct.pack(">I", len(config)) + config
    preimage += struct.pack(">Q", 2)
    preimage += struct.pack(">I", 1) + b"a" + struct.pack(">I", 3) + b"F16" + struct.pack(">IQ", 1, 2)
    preimage += hashlib.sha256(struct.pack("<2e", 1.5, -2)).digest()
    preimage += struct.pack(">I", 1) + b"b" + struct.pack(">I", 3) + b"F32" + struct.pack(">IQQ", 2, 2, 3)
    preimage += hashlib.sha256(struct.pack("<6f", *range(6))).digest()
    assert adapter_digest(TENSORS[:2], PEFT, CONTRACT) == hashlib.sha256(preimage).hexdigest()


@given(DRAWN_TENSORS, DRAWN_TENSORS)
def test_adapters_share_a_digest_only_when_their_tensors_are_equal(
    one: list[TensorDigest], other: list[TensorDigest]
) -> None:
    equal = adapter_digest(one, PEFT, CONTRACT) == adapter_digest(other, PEFT, CONTRACT)
    assert equal == (set(one) == set(other))
    assert (model_digest_of(one, MODEL) == model_digest_of(other, MODEL)) == equal


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in PEFT.items() if key != name}


@pytest.mark.parametrize(
    "config",
    [
        PEFT | {"target_modules": ["q_proj", "v_proj"]},
        PEFT | {"target_modules": ["q_proj", "v_proj", "v_proj"]},
        PEFT | {"lora_dropout": 0.1, "base_model_name_or_path": "x", "revision": "y", "task_type": "CAUSAL_LM"},
        PEFT
        | {
            "inference_mode": True,
            "peft_version": "0.22",
            "auto_mapping": {"a": 1},
            "eva_config": {"rho": 2},
        },
        PEFT | {"megatron_core": "megatron.core", "lora_alpha": 16.0, "init_lora_weights": False},
        PEFT | {"init_lora_weights": "orthogonal", "a_new_switch": False, "a_new_object": None},
        _without("use_dora"),
        _without("bias"),
        _without("qalora_group_size"),
        _without("rank_pattern"),
    ],
)
def test_what_the_forward_pass_does_not_read_is_outside(config: dict[str, Any]) -> None:
    assert adapter_digest(TENSORS, config, CONTRACT) == adapter_digest(TENSORS, PEFT, CONTRACT)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 16},
        {"lora_alpha": 32},
        {"use_rslora": True},
        {"use_dora": True},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"target_modules": ["q_proj"]},
        {"target_modules": "q_proj"},
        {"exclude_modules": ["visual"]},
        {"layers_to_transform": [0]},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"use_qalora": True},
        {"peft_type": "LOHA"},
        {"a_new_switch": True},
        {"a_new_number": 0},
    ],
)
def test_what_the_forward_pass_may_read_is_inside(change: dict[str, Any]) -> None:
    assert adapter_digest(TENSORS, PEFT | change, CONTRACT) != adapter_digest(TENSORS, PEFT, CONTRACT)


def test_the_contract_is_inside_and_must_be_a_digest() -> None:
    other = contract_digest({"max_pixels": 200705})
    assert adapter_digest(TENSORS, PEFT, other) != adapter_digest(TENSORS, PEFT, CONTRACT)
    with pytest.raises(NotCanonicalError, match="contract digest must be 64"):
        adapter_digest(TENSORS, PEFT, CONTRACT[:12])


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (_without("r"), r"\$\.r must be a number, got None$"),
        (PEFT | {"lora_alpha": True}, r"\$\.lora_alpha must be a number, got True"),
        (PEFT | {"lora_alpha": float("nan")}, r"\$\.lora_alpha must be finite"),
        (PEFT | {"target_modules": ["q", 7]}, r"\$\.target_modules\[1\] must be a string, got 7"),
        (PEFT | {"target_modules": [["q"]]}, r"\$\.target_modules\[0\] must be a string, got list"),
    ],
)
def test_a_config_without_canonical_form_is_refused(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(NotCanonicalError, match=problem):
        adapter_digest(TENSORS, config, CONTRACT)


def test_a_tensor_is_there_once() -> None:
    twice = [TENSORS[0], TENSORS[1], tensor_digest("b", "U8", (1,), b"\0")]
    with pytest.raises(DigestError, match="tensor 'b' is there twice"):
        adapter_digest(twice, PEFT, CONTRACT)
    with pytest.raises(DigestError, match="tensor 'b' is there twice"):
        adapter_digest([TENSORS[0], TENSORS[0]], PEFT, CONTRACT)


@pytest.mark.parametrize(
    ("dtype", "shape", "problem"),
    [("F32", (2,), "4 bytes, 8 by its shape"), ("X", (1,), "unknown dtype"), ("U8", (-4,), "got -4")],
)
def test_bytes_must_fit_dtype_and_shape(dtype: str, shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(SafetensorsError, match=problem):
        tensor_digest("t", dtype, shape, bytes(4))


def test_a_file_has_the_parts_of_its_tensors_whatever_its_metadata(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "x.safetensors", {"format": "pt"})
    assert set(tensor_digests(tmp_path / "x.safetensors")) == set(TENSORS)


def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"t{index}": np.full(index, index, np.int32) for index in range(50)}, tmp_path / "x.safetensors")
    alone = tensor_digests(tmp_path / "x.safetensors")
    monkeypatch.setattr(weights, "_THREADS_FROM_BYTES", 0)
    assert tensor_digests(tmp_path / "x.safetensors", threads=3) == alone
    assert tensor_digests(tmp_path / "x.safetensors") == alone


def _model(directory: Path, config: dict[str, Any] = MODEL) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(ARRAYS, directory / "model.safetensors")
    return directory


def _sharded_model(directory: Path, **changes: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODEL))
    save_file({"b": ARRAYS["b"]}, directory / "model-1.safetensors")
    save_file({"a": ARRAYS["a"], "é": ARRAYS["é"]}, directory / "model-2.safetensors")
    weight_map = {
        "a": "model-2.safetensors",
        "b": "model-1.safetensors",
        "é": "model-2.safetensors",
    } | changes
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_a_model_in_one_file_or_many_has_one_digest(tmp_path: Path) -> None:
    expected = model_digest_of(TENSORS, MODEL)
    assert model_digest(_model(tmp_path / "one")) == expected
    assert model_digest(_sharded_model(tmp_path / "many")) == expected


@pytest.mark.parametrize(
    ("tensor", "file", "problem"),
    [
        ("c", "model-2.safetensors", "tensor 'c' is in only one of"),
        ("a", "model-1.safetensors", "tensor 'a' is in only one of"),
        ("a", "../model-2.safetensors", "is not the name of a file"),
        ("a", "..", "is not the name of a file"),
        ("a", "a\0.safetensors", "is not the name of a file"),
        ("a", 7, "7 is not the name of a file beside it"),
    ],
)
def test_files_must_hold_what_their_index_says(tmp_path: Path, tensor: str, file: object, problem: str) -> None:
    with pytest.raises(SafetensorsError, match=problem):
        model_digest(_sharded_model(tmp_path / "many", **{tensor: file}))


def test_an_index_must_map_tensors_to_files(tmp_path: Path) -> None:
    directory = _sharded_model(tmp_path / "many")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": ["model-1.safetensors"]}')
    with pytest.raises(SafetensorsError, match="weight_map must be an object, got list"):
        model_digest(directory)


def _set(part: str, name: str, to: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        (config[part] if part else config)[name] = to

    return change


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (_set("", "transformers_version", "6"), False),
        (_set("", "architectures", ["Other"]), False),
        (_set("", "quantization_config", None), False),
        (_set("text_config", "dtype", "bfloat16"), False),
        (_set("vision_config", "initializer_range", 0.1), False),
        (_set("", "model_type", "other"), True),
        (_set("", "tie_word_embeddings", False), True),
        (_set("", "quantization_config", {"dtype": "int8"}), True),
        (_set("text_config", "rms_norm_eps", 1e-5), True),
        (_set("text_config", "rope_theta", 1e4), True),
        (_set("vision_config", "deepstack_visual_indexes", [5, 11]), True),
    ],
)
def test_a_models_digest_counts_what_the_forward_pass_reads(
    change: Callable[[dict[str, Any]], None], counts: bool
) -> None:
    config = copy.deepcopy(MODEL)
    change(config)
    assert (model_digest_of(TENSORS, config) != model_digest_of(TENSORS, MODEL)) == counts


def test_a_quantised_model_differs_by_the_dtype_in_its_settings() -> None:
    one, other = (MODEL | {"quantization_config": {"dtype": dtype}} for dtype in ("int8", "int4"))
    assert model_digest_of(TENSORS, one) != model_digest_of(TENSORS, other)


@pytest.mark.parametrize("text", ["[]", "{", '{"a":1,"a":2}', "7"])
def test_a_models_config_is_one_strict_object(tmp_path: Path, text: str) -> None:
    directory = _model(tmp_path / "one")
    (directory / "config.json").write_text(text)
    with pytest.raises(NotCanonicalError, match=r"^config\.json"):
        model_digest(directory)


def test_kinds_do_not_share_digests() -> None:
    nothing = b"{}"
    assert len({blob_digest(nothing), contract_digest({}), model_digest_of([], {})}) == 3
    assert contract_digest({}) == hashlib.sha256(b"veneer.contract.v1\0{}").hexdigest()
    assert contract_digest({"a": 1}) != contract_digest({"a": 2})


def test_a_blob_is_plain_sha256_of_bytes_or_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    with (tmp_path / "x").open("rb") as file:
        assert blob_digest(file) == blob_digest(b"abc") == blob_digest(memoryview(b"abc")) == expected
