import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from veneer_dataset.adapters.folder_blobs import FolderBlobs
from veneer_dataset.ports import BlobStore


def put(store: BlobStore, folder: Path, location: str, data: bytes) -> None:
    source = folder / "source"
    source.write_bytes(data)
    store.put(location, source)
    assert not source.exists()


@pytest.mark.parametrize("size", [0, 1, 5, (1 << 20), (3 << 20) + 7])
def test_what_was_put_is_read_from_any_offset(store: BlobStore, tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    put(store, tmp_path, "acme/ab/abc-1", data[:size])
    for offset in {0, size // 2, size}:
        pieces = list(store.read("acme/ab/abc-1", offset))
        assert b"".join(pieces) == data[offset:size]
        assert all(0 < len(piece) <= 1 << 20 for piece in pieces)
    assert store.whole("acme/ab/abc-1", size) == data[:size]
    assert store.whole("acme/ab/abc-1", size + 1) == data[:size]  # that it is cut short is the reader's to see
    into = bytearray(size)
    assert not store.at_hand("acme/ab/abc-1", memoryview(into)) or into == data[:size]


def test_what_is_not_there(store: BlobStore) -> None:
    with pytest.raises(FileNotFoundError):
        list(store.read("acme/ab/none"))
    with pytest.raises(FileNotFoundError):
        store.whole("acme/ab/none", 5)
    assert not store.at_hand("acme/ab/none", memoryview(bytearray(5)))
    store.delete("acme/ab/none")


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs Linux, which tells what is in its memory")
def test_a_folder_gives_what_was_written_just_now_without_a_wait(tmp_path: Path) -> None:
    store = FolderBlobs(tmp_path / "blobs")
    put(store, tmp_path, "acme/ab/abc-1", b"here")
    into = bytearray(5)
    assert store.at_hand("acme/ab/abc-1", memoryview(into)[:4])
    assert into == b"here\0"
    assert not store.at_hand("acme/ab/abc-1", memoryview(into))


def test_delete_and_list(store: BlobStore, tmp_path: Path) -> None:
    for name in "abc":
        put(store, tmp_path, f"t/{name}/{name}-1", name.encode())
    store.delete("t/b/b-1")
    found = dict(store.locations())
    assert sorted(found) == ["t/a/a-1", "t/c/c-1"]
    assert all(abs(datetime.now(UTC) - written) < timedelta(minutes=5) for written in found.values())
    with pytest.raises(FileNotFoundError):
        list(store.read("t/b/b-1"))
