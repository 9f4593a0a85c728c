# ruff: noqa: E501  # a case is read best on one line
"""What a path in a row means, and which paths mean nothing."""

import json
import unicodedata

import pytest

from veneer_dataset.domain.findings import Refusal
from veneer_dataset.domain.picture_paths import MAX_PATH_BYTES, PictureManifest
from veneer_rpc.errors import InvalidArgument


def manifest(*paths: str) -> PictureManifest:
    lines = (json.dumps({"path": path, "digest": f"{index:064x}"}).encode() + b"\n" for index, path in enumerate(paths))
    return PictureManifest(lines)


NFC = unicodedata.normalize("NFC", "é.png")
NFD = unicodedata.normalize("NFD", "é.png")


@pytest.mark.parametrize(
    ("paths", "asked", "entry", "code"),
    [
        (["a.png"], "a.png", 0, ""),
        (["a.png"], "./a.png", 0, ""),
        (["A.png", "a.png"], "a.png", 1, ""),
        (["A.PNG"], "a.png", 0, "PATH_CASE"),
        ([NFD], NFC, 0, "PATH_CASE"),
        (["images/a.png", "other/a.png"], "a.png", 0, "PATH_SEARCHED"),
        (["deep/down/a.png"], "a.png", 0, "PATH_SEARCHED"),
        (["deep/down/a.png"], "wrong/a.png", 0, "PATH_SEARCHED"),
        (["图 片/一　二.png"], "图 片/一　二.png", 0, ""),
    ],
)
def test_found(paths: list[str], asked: str, entry: int, code: str) -> None:
    match = manifest(*paths).resolve(asked, "$.image")
    assert (match.entry, match.code) == (entry, code)


@pytest.mark.parametrize(
    ("paths", "asked", "code"),
    [
        (["a.png"], "b.png", "PICTURE_MISSING"),
        (["x/a.png", "y/a.png"], "a.png", "PICTURE_AMBIGUOUS"),
        (["A.png", "a.PNG"], "a.png", "PICTURE_AMBIGUOUS"),
        *(
            (["a.png"], path, "PICTURE_PATH")
            for path in ("../a.png", "x/../a.png", "/a.png", "x\\a.png", "C:/a.png", "a\0.png", "a\n.png", "", "x//a.png", "x" * (MAX_PATH_BYTES + 1))
        ),
    ],
)  # fmt: skip
def test_not_found(paths: list[str], asked: str, code: str) -> None:
    with pytest.raises(Refusal) as refusal:
        manifest(*paths).resolve(asked, "$.image")
    assert refusal.value.code == code


@pytest.mark.parametrize(
    "line", [b"{}", b'{"path":"../a","digest":"' + b"0" * 64 + b'"}', b'{"path":"a","digest":"no"}', b"\xff", b"[1]"]
)
def test_a_malformed_manifest_is_the_callers_fault(line: bytes) -> None:
    with pytest.raises(InvalidArgument):
        PictureManifest([line])


def test_a_path_twice_is_refused_and_unnamed_ones_are_told() -> None:
    with pytest.raises(InvalidArgument, match="twice"):
        manifest("a", "b", "a")
    some = manifest("c", "a", "b")
    some.resolve("b", "$")
    assert some.unnamed() == ["a", "c"]
