"""The registry's copy on disk comes back as it was, or not at all."""

from pathlib import Path

import pytest

from veneer_inference.adapters.registry_file import RegistryFile
from veneer_inference.domain.registry import Registry, Release, Served, Split
from veneer_rpc.names import AdapterVersionName

ONE = Release("acme", AdapterVersionName("digits", 1), "ab" * 32)
TWO = Release("acme", AdapterVersionName("digits", 2), "cd" * 32)


@pytest.fixture
def registry() -> Registry:
    served = Served("acme", "digits", {"production": TWO}, Split("canary", 0.25), True)
    return Registry(7, [served], [ONE])


def test_it_comes_back(tmp_path: Path, registry: Registry) -> None:
    file = RegistryFile(tmp_path / "registry.json", "models/tiny")
    file.write(file.document(registry))
    read = file.load()
    assert list(read.served) == list(registry.served)
    assert set(read.known) == {ONE, TWO}
    assert [each.name for each in tmp_path.iterdir()] == ["registry.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1, "model": "models/tiny"}', '{"format": 99}'])
def test_what_cannot_be_read_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "registry.json").write_text(content)
    assert not list(RegistryFile(tmp_path / "registry.json", "models/tiny").load().served)


def test_another_bases_copy_counts_as_none(tmp_path: Path, registry: Registry) -> None:
    file = RegistryFile(tmp_path / "registry.json", "models/tiny")
    file.write(file.document(registry))
    assert not list(RegistryFile(tmp_path / "registry.json", "models/large").load().served)
