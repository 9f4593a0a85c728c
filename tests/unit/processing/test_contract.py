import json
from dataclasses import fields, replace

import pytest

from veneer_digests import contract_digest
from veneer_processing import ContractMismatchError, ProcessingContract, ProcessingError

CONTRACT = ProcessingContract(
    model_digest="a" * 64,
    tokenizer_digest="b" * 64,
    template_digest="c" * 64,
    min_pixels=4_096,
    max_pixels=200_704,
    patch_size=16,
    merge_size=2,
    temporal_patch_size=2,
    interpolation="bicubic",
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 1.0),
    picture_rule="p",
    mask_rule="m",
)


def test_it_survives_json() -> None:
    assert ProcessingContract.from_dict(json.loads(json.dumps(CONTRACT.to_dict()))) == CONTRACT


def test_whole_numbers_stand_for_floats_and_change_no_digest() -> None:
    # JSON of another language may write 1.0 as 1.
    values = CONTRACT.to_dict() | {"image_std": [0.5, 0.5, 1]}
    assert ProcessingContract.from_dict(dict(values)) == CONTRACT
    assert contract_digest(values) == CONTRACT.digest


def test_every_field_is_part_of_its_digest() -> None:
    changed = {
        field.name: replace(CONTRACT, **{field.name: OTHER[type(getattr(CONTRACT, field.name))]}).digest
        for field in fields(CONTRACT)
    }
    assert len({CONTRACT.digest, *changed.values()}) == len(changed) + 1


OTHER: dict[type, object] = {str: "other", int: 7, tuple: (0.1, 0.2, 0.3)}


def test_values_that_are_no_contract_are_refused_all_at_once() -> None:
    values = {key: value for key, value in CONTRACT.to_dict().items() if key != "mask_rule"}
    values |= {"patch_size": "16", "min_pixels": True, "image_mean": [0.5, "0.5"], "colour": 1}
    with pytest.raises(ProcessingError) as refusal:
        ProcessingContract.from_dict(dict(values))
    for words in (
        "unknown 'colour'",
        "patch_size must be of type int, got '16'",
        "min_pixels",
        "image_mean",
        "mask_rule",
    ):
        assert words in str(refusal.value)


def test_every_difference_is_listed() -> None:
    CONTRACT.require(CONTRACT)
    with pytest.raises(ContractMismatchError) as refusal:
        CONTRACT.require(replace(CONTRACT, tokenizer_digest="d" * 64, merge_size=3, image_mean=(0.0, 0.0, 0.0)))
    assert [each.split(":")[0] for each in refusal.value.differences] == [
        "tokenizer_digest",
        "merge_size",
        "image_mean",
    ]
    assert "merge_size: this model has 2, the contract 3" in str(refusal.value)
