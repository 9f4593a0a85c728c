"""Adapters on disk: there whole or not at all, under the digest of their own bytes, within a bound."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from veneer_inference.adapters.adapter_folders import AdapterFolder, AdapterFolders, FolderError
from veneer_processing import ProcessingContract

CONTRACT = ProcessingContract(
    "aa" * 32, "bb" * 32, "cc" * 32, 4096, 200_704, 16, 2, 2, "bicubic", (0.5,) * 3, (0.5,) * 3, "p-1", "m-1"
)


def files(seed: int = 0, size: int = 8) -> dict[str, bytes]:
    tensors = {"a": np.random.default_rng(seed).standard_normal(size).astype(np.float32)}
    return {
        "adapter_config.json": json.dumps({"r": 2, "lora_alpha": 4}).encode(),
        "adapter_model.safetensors": save(tensors),
        "processing_contract.json": json.dumps(CONTRACT.to_dict()).encode(),
    }


def receive(folders: AdapterFolders, content: dict[str, bytes], digest: str = "") -> AdapterFolder:
    incoming = folders.incoming(1 << 20)
    try:
        for name, data in content.items():
            for at in range(0, len(data), 50):
                incoming.write(name, at, data[at : at + 50])
        incoming.sync()
        return folders.keep(incoming, digest)
    finally:
        incoming.close()


@pytest.fixture
def folders(tmp_path: Path) -> AdapterFolders:
    return AdapterFolders(tmp_path, 1 << 20)


def names(root: Path) -> list[str]:
    return sorted(each.name for each in root.iterdir())


def test_a_download_is_kept_under_its_digest_and_found_again(folders: AdapterFolders, tmp_path: Path) -> None:
    kept = receive(folders, files())
    assert names(tmp_path) == [kept.digest]
    assert kept.contract == CONTRACT
    assert kept.size_bytes == sum(map(len, files().values()))
    assert AdapterFolders(tmp_path, 1).find(kept.digest) == kept
    assert receive(folders, files(), kept.digest) == kept  # twice is once
    assert folders.find("ab" * 32) is None
    assert folders.find("../" + kept.digest) is None


@pytest.mark.parametrize("missing", list(files()))
def test_a_folder_without_one_of_its_files_is_none(folders: AdapterFolders, tmp_path: Path, missing: str) -> None:
    with pytest.raises(FolderError, match=missing):
        receive(folders, {name: data for name, data in files().items() if name != missing})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("adapter_model.safetensors", b"\x80\x04pickle"),
        ("adapter_model.safetensors", (2**63 - 1).to_bytes(8, "little")),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b'{"r": "x"}'),
        ("processing_contract.json", b"[]"),
        ("processing_contract.json", b"{}"),
        ("processing_contract.json", b"\xff"),
        ("processing_contract.json", json.dumps(CONTRACT.to_dict() | {"more": 1}).encode()),
    ],
)
def test_a_malformed_file_is_refused(folders: AdapterFolders, tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(FolderError):
        receive(folders, files() | {name: data})
    assert names(tmp_path) == []


def test_bytes_with_another_digest_are_refused(folders: AdapterFolders, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="the registry says"):
        receive(folders, files(), "ab" * 32)
    assert names(tmp_path) == []


def test_the_contract_is_part_of_the_digest(folders: AdapterFolders) -> None:
    other = json.dumps(replace(CONTRACT, max_pixels=4096).to_dict()).encode()
    assert receive(folders, files()).digest != receive(folders, files() | {"processing_contract.json": other}).digest


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".hidden", "", "a\0b", "x" * 200, "ä"])
def test_a_file_with_a_strange_name_is_refused(folders: AdapterFolders, name: str) -> None:
    incoming = folders.incoming(100)
    with pytest.raises(FolderError, match="file named"):
        incoming.write(name, 0, b"x")


def test_gaps_and_too_many_bytes_are_refused(folders: AdapterFolders) -> None:
    incoming = folders.incoming(10)
    incoming.write("a", 0, b"12345")
    with pytest.raises(FolderError, match="byte 6 came where 5 was due"):
        incoming.write("a", 6, b"1")
    with pytest.raises(FolderError, match="more than 10 bytes"):
        incoming.write("a", 5, b"123456")


def test_what_an_earlier_process_left_unfinished_goes(folders: AdapterFolders, tmp_path: Path) -> None:
    folders.incoming(10).write("a", 0, b"x")
    kept = receive(folders, files())
    assert len(names(tmp_path)) == 2
    AdapterFolders(tmp_path, 1)
    assert names(tmp_path) == [kept.digest]


def test_a_damaged_folder_is_deleted_when_it_is_found(folders: AdapterFolders, tmp_path: Path) -> None:
    kept = receive(folders, files())
    (kept.directory / "processing_contract.json").unlink()
    assert folders.find(kept.digest) is None
    assert names(tmp_path) == []


def test_the_longest_unused_go_first_and_what_is_in_use_stays(tmp_path: Path) -> None:
    kept = [receive(AdapterFolders(tmp_path, 1), files(seed)) for seed in range(4)]
    folders = AdapterFolders(tmp_path, 2 * kept[0].size_bytes)
    for age, each in enumerate(kept):
        os.utime(each.directory, (1000 + age, 1000 + age))
    folders.find(kept[1].digest)  # used just now
    folders.trim({kept[0].digest})
    assert names(tmp_path) == sorted([kept[0].digest, kept[1].digest])
    folders.trim(set())
    assert len(names(tmp_path)) == 2
