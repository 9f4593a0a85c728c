"""Folders that arrive: nothing but what was announced is taken, and nothing lies elsewhere."""

import hashlib
from pathlib import Path

import pytest

from veneer_rpc.errors import DataLoss, InvalidArgument, OutOfRange, ResourceExhausted
from veneer_trainer.adapters.received_files import ReceivedFiles
from veneer_trainer.domain.files import StoredFile

DATA = b"0123456789"


def announced(path: str = "part/a.bin", size_bytes: int = len(DATA), data: bytes = DATA) -> StoredFile:
    return StoredFile(path, hashlib.sha256(data).hexdigest(), size_bytes)


def receive(folder: Path, *pieces: bytes, file: StoredFile | None = None) -> Path:
    files = ReceivedFiles(folder, [file or announced()], 100)
    try:
        for piece in pieces:
            files.write("part/a.bin", piece)
        return files.check()
    except BaseException:
        files.abandon()
        raise


def test_what_was_announced_is_taken(tmp_path: Path) -> None:
    folder = receive(tmp_path, DATA[:4], DATA[4:])
    assert (folder / "part/a.bin").read_bytes() == DATA


@pytest.mark.parametrize("pieces", [[], [DATA[:-1]], [DATA[:-1] + b"x"], [DATA[4:], DATA[:4]]])
def test_other_bytes_are_refused_and_leave_nothing(tmp_path: Path, pieces: list[bytes]) -> None:
    with pytest.raises(DataLoss):
        receive(tmp_path, *pieces)
    assert not list(tmp_path.iterdir())


def test_more_than_was_announced_is_refused_as_it_comes(tmp_path: Path) -> None:
    with pytest.raises(OutOfRange):
        receive(tmp_path, DATA, b"x")
    with pytest.raises(InvalidArgument, match="was not announced"):
        ReceivedFiles(tmp_path, [announced()], 100).write("b.bin", b"x")


@pytest.mark.parametrize("path", ["../a", "/a", "a/../b", ".hidden", "a//b", "a\\b", "", "a/b/c/d/e"])
def test_only_plain_paths_are_announced(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidArgument):
        ReceivedFiles(tmp_path, [announced(path)], 100)


def test_bounds_hold_before_a_byte_comes(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted):
        ReceivedFiles(tmp_path, [announced(size_bytes=101)], 100)
    with pytest.raises(InvalidArgument, match="twice"):
        ReceivedFiles(tmp_path, [announced(), announced()], 100)
    with pytest.raises(InvalidArgument, match="1 to"):
        ReceivedFiles(tmp_path, [], 100)
