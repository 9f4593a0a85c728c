"""Resource names: patterns, round trips, and errors that say what was expected."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_rpc import names
from veneer_rpc.errors import InvalidArgument
from veneer_rpc.names import (
    ALL,
    AdapterAliasName,
    AdapterName,
    AdapterVersionName,
    DatasetName,
    DatasetVersionName,
    TrainingJobName,
    parse_one_of,
    type_of,
)

ids = st.from_regex(r"\A[a-z]([a-z0-9-]{0,61}[a-z0-9])?\Z")
sha256s = st.from_regex(r"\A[0-9a-f]{64}\Z")
counts = st.integers(1, 10**18 - 1)


def built(kind: type[names.ResourceName]) -> st.SearchStrategy[names.ResourceName]:
    parts = dict.fromkeys(re.findall(r"\{(\w+)\}", kind.pattern), ids)
    if kind is DatasetVersionName:
        parts["version"] = sha256s
    if kind is AdapterVersionName:
        return st.builds(kind, adapter=ids, version=counts)
    return st.builds(kind, **parts)


@given(st.sampled_from(ALL).flatmap(built))
def test_a_name_survives_its_text_and_is_of_one_kind_only(name: names.ResourceName) -> None:
    assert type(name).parse(str(name)) == name
    assert parse_one_of(str(name), "name", *ALL) == name
    assert type_of(str(name)) == name.type


@given(st.text(max_size=80) | st.from_regex(r"\A(datasets|adapters)/.{0,70}(/versions/.{0,70})?\Z"))
def test_any_text_is_a_name_that_reads_the_same_or_refused(text: str) -> None:
    for kind in ALL:
        try:
            name = kind.parse(text)
        except InvalidArgument as refused:
            told = refused.violations[0].field
        else:
            told = str(name)
        assert told in (text, "name")


@pytest.mark.parametrize("good", ["a", "a1", "a-b", "a--b", "z" * 63])
def test_good_ids(good: str) -> None:
    assert DatasetName.parse(f"datasets/{good}").dataset == good
    assert names.is_id(good)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "A",
        "1a",
        "-a",
        "a-",
        "a_b",
        "a.b",
        "a b",
        "é",
        "\uff41",
        "a/b",
        "a@b",
        "z" * 64,
        "a\n",
        "a\0",
        "..",
        "%61",
    ],
)
def test_bad_ids(bad: str) -> None:
    assert not names.is_id(bad)
    for text in (f"datasets/{bad}", f"adapters/{bad}/versions/1", f"adapters/x@{bad}"):
        for kind in (DatasetName, AdapterVersionName, AdapterAliasName):
            with pytest.raises(InvalidArgument):
                kind.parse(text)


@pytest.mark.parametrize("version", ["0", "01", "-1", "+1", "1.0", "\u0661", "1" * 19, "", " 1", "1\n"])
def test_bad_adapter_versions(version: str) -> None:
    with pytest.raises(InvalidArgument):
        AdapterVersionName.parse(f"adapters/x/versions/{version}")


@pytest.mark.parametrize("version", ["a" * 63, "a" * 65, "A" * 64, "g" * 64, ""])
def test_bad_dataset_versions(version: str) -> None:
    with pytest.raises(InvalidArgument):
        DatasetVersionName.parse(f"datasets/x/versions/{version}")


@pytest.mark.parametrize(
    "text", ["/datasets/x", "datasets/x/", "datasets//x", "Datasets/x", "models/x", "datasets/x\n"]
)
def test_bad_shapes(text: str) -> None:
    with pytest.raises(InvalidArgument):
        DatasetName.parse(text)


def test_the_error_names_field_pattern_and_value() -> None:
    with pytest.raises(InvalidArgument) as caught:
        TrainingJobName.parse("jobs/" + "x" * 5000, "job")
    (violation,) = caught.value.violations
    assert violation.field == "job"
    assert "trainingJobs/{training_job}" in violation.description
    assert "(5005 characters)" in violation.description
    assert len(violation.description) < 400


def test_a_reference_may_be_of_several_kinds() -> None:
    kinds = (AdapterName, AdapterAliasName, AdapterVersionName)
    assert parse_one_of("adapters/x", "model", *kinds) == AdapterName("x")
    assert parse_one_of("adapters/x@prod", "model", *kinds) == AdapterAliasName("x", "prod")
    assert parse_one_of("adapters/x/versions/7", "model", *kinds) == AdapterVersionName("x", 7)
    with pytest.raises(InvalidArgument) as caught:
        parse_one_of("adapters/x@", "model", *kinds)
    for kind in kinds:
        assert kind.pattern in caught.value.violations[0].description


@pytest.mark.parametrize("make", [lambda: DatasetName("A"), lambda: AdapterVersionName("x", 0)])
def test_a_name_cannot_be_made_of_bad_parts(make: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()  # type: ignore[operator]
