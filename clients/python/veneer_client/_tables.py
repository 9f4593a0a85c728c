"""Tables of rows, as Parquet and Hugging Face's `datasets` keep them, written out as JSON lines and picture files.

The service reads neither, so that it parses one format only. Columns keep their names: what they mean is the
service's matter, as with any row. Bytes are pictures, whether bare or as an `Image` feature's (bytes, path).
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer_client._errors import FolderError

_ROWS_AT_ONCE = 16  # pictures and all they are in memory
_BUFFER_BYTES = 1024 * 1024
_STATE = "state.json"  # of a folder that save_to_disk wrote: names its arrow files; others there are caches
_IMAGE_KEYS = {"bytes", "path"}


@dataclass(frozen=True, slots=True)
class Table:
    """A file of rows; `split` is what its folder says, else empty."""

    file: Path
    split: str


def find_tables(paths: Sequence[Path]) -> list[Table]:
    """The tables among a folder's files, in their order.

    Raises:
        FolderError: a folder of `datasets` lacks a file, or selects rows by another.
    """
    states = {path.parent: state for path in paths if path.name == _STATE and (state := _read_state(path))}
    named = {folder / each["filename"]: state for folder, state in states.items() for each in state["_data_files"]}
    if missing := sorted(named.keys() - set(paths)):
        raise FolderError(f"{missing[0]} is not there, though {missing[0].parent / _STATE} names it")
    tables = []
    for path in paths:
        if path in named:
            tables.append(Table(path, named[path].get("_split") or ""))
        elif path.suffix == ".parquet" or (path.suffix == ".arrow" and path.parent not in states):
            tables.append(Table(path, ""))
    return tables


class TableWriter:
    """Writes out tables of one dataset.

    Args:
        root: the data's; a picture's absolute path below it becomes relative.
        scratch: an empty folder for the files.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self._root = root
        self._scratch = scratch
        self._path_by_digest: dict[str, str] = {}

    def write(self, table: Table, on_row: Callable[[], None]) -> Path:
        """Writes a table's rows and pictures; returns a file of JSON lines, of which line n is row n.

        Raises:
            FolderError: pyarrow is not installed, or the file cannot be read.
        """
        name = table.file.relative_to(self._root).as_posix()
        rows = self._scratch / f"{hashlib.sha256(name.encode()).hexdigest()}.jsonl"
        with rows.open("w", encoding="utf-8") as out:
            for number, row in enumerate(_rows(table.file), 1):
                places = (f"{name}/{number}/{count}" for count in itertools.count(1))
                out.write(json.dumps(self._taken_out(row, places), ensure_ascii=False, default=str) + "\n")
                on_row()
        return rows

    def pictures(self) -> Iterator[tuple[str, Path]]:
        """Path and file of each picture so far: its table, row and number where it came first."""
        for digest, path in self._path_by_digest.items():
            yield path, self._scratch / digest

    def _taken_out(self, value: Any, places: Iterator[str]) -> Any:  # noqa: ANN401  # whatever a column holds
        """The value with a path in place of each picture, and without what is null: in a table every key is there."""
        if isinstance(value, bytes):
            return self._keep(value, places)
        if isinstance(value, list):
            return [self._taken_out(each, places) for each in value]
        if not isinstance(value, dict):
            return value
        if value.keys() != _IMAGE_KEYS:
            return {key: self._taken_out(each, places) for key, each in value.items() if each is not None}
        if value["bytes"] is not None:
            return self._keep(value["bytes"], places)
        path = Path(value["path"] or "")
        return path.relative_to(self._root).as_posix() if path.is_relative_to(self._root) else value["path"]

    def _keep(self, data: bytes, places: Iterator[str]) -> str:
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._path_by_digest:
            (self._scratch / digest).write_bytes(data)
            self._path_by_digest[digest] = next(places)
        return self._path_by_digest[digest]


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or "_data_files" not in state:
        return None
    if state.get("_indices_data_files"):
        raise FolderError(f"{path.parent} holds a selection of rows. Save it anew, after flatten_indices()")
    return state


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise FolderError(f"{file} is read with pyarrow, which is missing: pip install 'veneer[tables]'") from None

    def batches() -> "Iterable[Any]":
        if file.suffix == ".parquet":
            with parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
                yield from table.iter_batches(_ROWS_AT_ONCE)
        else:
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
                yield from stream

    try:
        for batch in batches():
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise FolderError(f"{file} cannot be read: {error}") from error
