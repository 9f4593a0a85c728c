"""A folder of rows and pictures as it lies on disk. Owns which files belong to a dataset; reads no row.

The service reads rows, in whatever dialect: it gets the row files as they are (tables written out as JSON lines), and a
manifest that says which bytes each picture's path stands for.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from veneer_client._errors import FolderError
from veneer_client._tables import TableWriter, find_tables

# What the service cannot read is sent too: it then says so of the picture, not that the picture is missing.
PICTURE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SPLITS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_SPLIT_OF_NAME = re.compile(rf"({'|'.join(_SPLITS)})([-_.]|\d|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LocalBlob:
    """Bytes that a service may need, by their SHA-256.

    Attributes:
        path: relative to the folder, `/` between the parts.
        source: the file, or the bytes themselves.
    """

    path: str
    digest: str
    size_bytes: int
    source: Path | bytes

    def read(self, offset_bytes: int, limit_bytes: int) -> bytes:
        """Returns at most so many bytes from an offset."""
        if isinstance(self.source, bytes):
            return self.source[offset_bytes : offset_bytes + limit_bytes]
        with self.source.open("rb") as file:
            file.seek(offset_bytes)
            return file.read(limit_bytes)


@dataclass(frozen=True, slots=True)
class Folder:
    """The files of a dataset, and the manifest of its pictures.

    Attributes:
        row_files: JSON lines; one that was a table keeps its path, and line n is its row n.
        splits: of each row file, empty where nothing says.
    """

    row_files: tuple[LocalBlob, ...]
    splits: tuple[str, ...]
    pictures: tuple[LocalBlob, ...]
    manifest: LocalBlob

    def blobs(self) -> tuple[LocalBlob, ...]:
        """Everything, each content once."""
        every = (*self.row_files, *self.pictures, self.manifest)
        return tuple({blob.digest: blob for blob in every}.values())


def read_folder(
    directory: Path,
    scratch: Path,
    on_hashed: Callable[[int, int], None],
    on_converted: Callable[[int], None] = lambda rows: None,
) -> Folder:
    """Finds and hashes a dataset's files: all rows and every picture, hidden ones left out.

    Rows are `*.jsonl`, `*.parquet` and what `datasets` saved (arrow files).

    Args:
        directory: the data's root; paths in rows are relative to it.
        scratch: an empty folder for what tables hold; it must live as long as the result is read.
        on_hashed: is told how many of how many files are hashed.
        on_converted: is told how many rows of tables are written out.

    Raises:
        FolderError: no such folder, no row file in it, a file that cannot be read, or a name not in UTF-8.
    """
    if not directory.is_dir():
        raise FolderError(f"{directory} is no folder. Name the folder that holds train.jsonl")
    directory = directory.absolute()
    paths = sorted(_files(directory))
    tables = find_tables(paths)
    rows = [(_name(path, directory), path) for path in paths if path.suffix.lower() == ".jsonl"]
    pictures = [(_name(path, directory), path) for path in paths if path.suffix.lower() in PICTURE_SUFFIXES]
    if not rows and not tables:
        raise FolderError(
            f"{directory} holds no *.jsonl, *.parquet or *.arrow file. Write train.jsonl there, a row a line, such as "
            '{"image": "images/001.jpg", "text": "a red fire engine"}'
        )
    splits = [split_of(name) for name, _ in rows]
    writer, converted = TableWriter(directory, scratch), itertools.count(1)
    for table in tables:
        name = _name(table.file, directory)
        rows.append((name, writer.write(table, lambda: on_converted(next(converted)))))
        splits.append(table.split or split_of(name) or split_of(name.rpartition("/")[0]))
    pictures += writer.pictures()
    blobs: list[LocalBlob] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for blob in pool.map(_hashed, [*rows, *pictures]):
            blobs.append(blob)
            on_hashed(len(blobs), len(rows) + len(pictures))
    found = tuple(blobs[len(rows) :])
    return Folder(tuple(blobs[: len(rows)]), tuple(splits), found, _manifest(found))


def split_of(path: str) -> str:
    """The split that a row file's name says, `val-0003.jsonl` is `validation`; empty where it says none."""
    match = _SPLIT_OF_NAME.match(path.rpartition("/")[2].removesuffix(".jsonl"))
    return _SPLITS[match[1].lower()] if match else ""


def bytes_blob(path: str, data: bytes) -> LocalBlob:
    """Bytes that are in no file."""
    return LocalBlob(path, hashlib.sha256(data).hexdigest(), len(data), data)


def _files(directory: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _name(path: Path, directory: Path) -> str:
    name = path.relative_to(directory).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise FolderError(f"{name!r} in {directory} is not named in UTF-8. Rename it") from error
    return name


def _hashed(named: tuple[str, Path]) -> LocalBlob:
    name, path = named
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return LocalBlob(name, digest, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}") from error


def _manifest(pictures: tuple[LocalBlob, ...]) -> LocalBlob:
    lines = [json.dumps({"path": picture.path, "digest": picture.digest}) for picture in pictures]
    return bytes_blob("manifest", "".join(f"{line}\n" for line in lines).encode())
