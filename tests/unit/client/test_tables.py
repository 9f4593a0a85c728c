"""Parquet files and folders of Hugging Face `datasets`, as the client writes them out for the service."""

import builtins
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from veneer_client import FolderError
from veneer_client._folder import Folder, LocalBlob, read_folder

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def read(root: Path) -> Folder:
    return read_folder(root, Path(tempfile.mkdtemp(dir=root.parent)), lambda done, total: None)


def rows(blob: LocalBlob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in blob.read(0, blob.size_bytes).splitlines()]


def write_arrow(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=3)


def save_to_disk(folder: Path, table: pa.Table, split: str | None, **state: object) -> None:
    """What `datasets.Dataset.save_to_disk` leaves, in two shards."""
    names = [f"data-{shard:05d}-of-00002.arrow" for shard in range(2)]
    half = table.num_rows // 2
    for name, part in zip(names, (table.slice(0, half), table.slice(half)), strict=True):
        write_arrow(folder / name, part)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": split, **state}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_parquet_file_with_pictures_as_bytes_or_paths_in_any_place(root: Path) -> None:
    (root / "images").mkdir()
    (root / "images" / "a.png").write_bytes(b"outer")
    given = [
        {"image": {"bytes": b"first", "path": "x.png"}, "text": "一", "raw": None, "images": None, "n": 1},
        {"image": {"bytes": None, "path": "images/a.png"}, "text": "二", "raw": None, "images": None, "n": None},
        {"image": {"bytes": None, "path": str(root / "images/a.png")}, "text": "三", "raw": None, "images": [], "n": 3},
        {"image": None, "text": "四", "raw": b"second", "images": [{"bytes": b"third", "path": None}] * 2, "n": 4},
    ]
    schema = pa.schema(
        [("image", IMAGE), ("text", pa.string()), ("raw", pa.binary()), ("images", pa.list_(IMAGE)), ("n", pa.int64())]
    )
    parquet.write_table(pa.Table.from_pylist(given, schema), root / "val-00000-of-00001.parquet")
    folder = read(root)
    (file,) = folder.row_files
    assert (file.path, folder.splits) == ("val-00000-of-00001.parquet", ("validation",))
    assert rows(file) == [
        {"image": "val-00000-of-00001.parquet/1/1", "text": "一", "n": 1},
        {"image": "images/a.png", "text": "二"},
        {"image": "images/a.png", "text": "三", "images": [], "n": 3},
        {
            "text": "四",
            "raw": "val-00000-of-00001.parquet/4/1",
            "images": ["val-00000-of-00001.parquet/4/2"] * 2,  # one content, one path
            "n": 4,
        },
    ]
    assert {picture.path: picture.read(0, 99) for picture in folder.pictures} == {
        "images/a.png": b"outer",
        "val-00000-of-00001.parquet/1/1": b"first",
        "val-00000-of-00001.parquet/4/1": b"second",
        "val-00000-of-00001.parquet/4/2": b"third",
    }


def test_chat_rows_stay_as_they_are_but_for_nulls(root: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "that"}]},
    ]
    parquet.write_table(pa.Table.from_pylist([{"messages": messages, "images": [b"p"]}]), root / "rows.parquet")
    folder = read(root)
    (row,) = rows(folder.row_files[0])
    assert row["messages"][0]["content"][0] == {"type": "image"}
    assert row["messages"][1] == messages[1]
    assert row["images"] == ["rows.parquet/1/1"]
    assert folder.splits == ("",)


def test_a_saved_dataset_with_its_splits_and_without_its_caches(root: Path) -> None:
    table = pa.table(
        {"image": pa.array([{"bytes": b"%d" % n, "path": None} for n in range(8)], IMAGE), "text": ["t"] * 8}
    )
    (root / "dataset_dict.json").write_text('{"splits": ["train", "held_out"]}')
    save_to_disk(root / "train", table, "train")
    save_to_disk(root / "held_out", table.slice(0, 2), "held_out")
    write_arrow(root / "train" / "cache-0123456789abcdef.arrow", table)
    folder = read(root)
    assert [(file.path, split) for file, split in zip(folder.row_files, folder.splits, strict=True)] == [
        ("held_out/data-00000-of-00002.arrow", "held_out"),
        ("held_out/data-00001-of-00002.arrow", "held_out"),
        ("train/data-00000-of-00002.arrow", "train"),
        ("train/data-00001-of-00002.arrow", "train"),
    ]
    assert sum(len(rows(file)) for file in folder.row_files) == 10
    assert sorted(picture.read(0, 9) for picture in folder.pictures) == [b"%d" % number for number in range(8)]


def test_a_split_is_read_from_the_folder_where_nothing_else_says_it(root: Path) -> None:
    table = pa.table({"prompt": ["q"], "text": ["a"]})
    (root / "test").mkdir()
    parquet.write_table(table, root / "test" / "0000.parquet")
    write_arrow(root / "captions-train.arrow", table)
    folder = read(root)
    assert dict(zip([file.path for file in folder.row_files], folder.splits, strict=True)) == {
        "captions-train.arrow": "",
        "test/0000.parquet": "test",
    }


def test_what_cannot_be_read_is_named(root: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    save_to_disk(root, table, "train", _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(FolderError, match="after flatten_indices"):
        read(root)
    save_to_disk(root, table, "train")
    (root / "data-00001-of-00002.arrow").write_bytes(b"broken")
    with pytest.raises(FolderError, match=r"data-00001-of-00002\.arrow cannot be read"):
        read(root)
    (root / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(FolderError, match=r"data-00001-of-00002\.arrow is not there, though .*state\.json names it"):
        read(root)


def test_a_saved_dataset_without_a_split(root: Path) -> None:
    save_to_disk(root, pa.table({"text": ["a", "b"]}), None)
    assert read(root).splits == ("", "")


def test_values_that_json_has_no_form_for(root: Path) -> None:
    moment = datetime(2026, 11, 24, 12, tzinfo=UTC)
    schema = pa.schema([("image", IMAGE), ("text", pa.string()), ("at", pa.timestamp("us", "UTC"))])
    given = [{"image": {"bytes": None, "path": None}, "text": "a", "at": moment}]
    parquet.write_table(pa.Table.from_pylist(given, schema), root / "rows.parquet")
    (row,) = rows(read(root).row_files[0])
    assert row == {"image": None, "text": "a", "at": str(moment)}


@pytest.mark.parametrize("state", ["7", "[]", '{"step": 3}'])
def test_a_state_of_another_program_says_nothing_about_tables(root: Path, state: str) -> None:
    (root / "state.json").write_text(state)
    write_arrow(root / "rows.arrow", pa.table({"text": ["a"]}))
    assert [file.path for file in read(root).row_files] == ["rows.arrow"]


def test_a_broken_state_is_named(root: Path) -> None:
    (root / "state.json").write_text("{")
    with pytest.raises(FolderError, match=r"state\.json cannot be read"):
        read(root)


def test_a_broken_page_is_named(root: Path) -> None:
    file = root / "rows.parquet"
    parquet.write_table(pa.table({"text": [f"row {number}" for number in range(1000)]}), file)
    data = bytearray(file.read_bytes())
    data[4:400] = b"\xff" * 396  # behind the magic number: the first page; the footer is whole
    file.write_bytes(data)
    with pytest.raises(FolderError, match=r"rows\.parquet cannot be read"):
        read(root)


def test_without_pyarrow_it_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), root / "train.parquet")
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:  # noqa: ANN401  # what __import__ takes and returns
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(FolderError, match=r"train\.parquet is read with pyarrow.*pip install 'veneer\[tables\]'"):
        read(root)
