"""Packs are what was put in, or are not there at all."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer_dataset.adapters import packs
from veneer_dataset.adapters.packs import PackFolder
from veneer_dataset.domain.packed import NewRow, PackedPicture, PackedRow, PictureHole
from veneer_rpc.errors import NotFound, Unavailable

NAME = f"1-{'ab' * 32}"
MANY_BYTES = 1 << 30
HARMS = ["lost", "cut", "empty", "longer", "renamed"]
HARMS += [f"byte {at}" for at in (0, 7, 8, 15, 16, 23, 24, 27, 28, 100, 300, -1)]


def rows_of(count: int, body_bytes: int = 20) -> list[NewRow]:
    rows = []
    for number in range(count):
        hole = PictureHole(f"{number:064x}", number, number + 1)
        pictures = [PackedPicture(hole, number, f"acme/00/{number}")] * (number % 3)
        body = number.to_bytes(4) * (body_bytes // 4 + number % 2)
        rows.append(NewRow(os.urandom(32), b"h%d" % number, PackedRow(body, pictures)))
    return rows


def made(folder: PackFolder, rows: Sequence[NewRow], name: str = NAME) -> None:
    for _ in folder.make(name, lambda: iter([rows[:3], rows[3:]])):
        pass


@pytest.fixture
def folder(tmp_path: Path) -> PackFolder:
    return PackFolder(tmp_path, MANY_BYTES)


@settings(max_examples=30)
@given(st.data())
def test_rows_in_any_order(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = PackFolder(tmp_path_factory.mktemp("packs"), MANY_BYTES)
    rows = rows_of(data.draw(st.integers(4, 40)))
    made(folder, rows)
    pack = folder.open(NAME)
    assert pack is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "_BYTES_AT_ONCE", data.draw(st.sampled_from([1, 100, 1 << 20])))
        asked = st.lists(st.integers(0, len(rows) - 1), min_size=1) | st.just(list(range(2, len(rows))))
        positions = data.draw(asked)
        at = 0
        while at < len(positions):
            some = np.array(positions[at:])
            expected = [rows[position].row for position in positions[at:]]
            bodies, whole = pack.some_bodies(some), pack.some_rows(some)
            assert len(bodies) == len(whole) >= 1
            assert bodies == [row.body for row in expected[: len(bodies)]]
            assert whole == expected[: len(whole)]
            at += len(whole)
        start = data.draw(st.integers(0, len(rows) - 1))
        run = b""
        at = start
        while at < len(rows):
            count, some_bytes = pack.some_run(at, len(rows))
            assert count >= 1
            at, run = at + count, run + some_bytes
        assert (at, run) == (len(rows), b"".join(each.head + each.row.body for each in rows[start:]))
        assert pack.digests(1, len(rows) - 2) == b"".join(each.digest for each in rows[1:-1])
    pack.close()


def test_pieces_are_of_about_a_mib(folder: PackFolder) -> None:
    made(folder, rows_of(100, 40_000))
    pack = folder.open(NAME)
    assert pack is not None
    count, run = pack.some_run(0, 100)
    assert 25 <= count <= 27
    assert 1_000_000 < len(run) <= 1 << 20
    assert 25 <= len(pack.some_bodies(np.arange(100))) <= 27
    assert pack.some_run(98, 100)[0] == 2
    pack.close()


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("harm", HARMS)
def test_a_pack_that_is_lost_or_damaged_is_made_again(tmp_path: Path, harm: str, restarted: bool) -> None:
    folder, rows, file = PackFolder(tmp_path, MANY_BYTES), rows_of(5), tmp_path / NAME
    made(folder, rows)
    first = folder.open(NAME)
    assert first is not None
    first.close()
    whole = file.read_bytes()
    if harm == "lost":
        file.unlink()
    elif harm == "renamed":
        made(folder, rows_of(5), "2-other")
        (tmp_path / "2-other").replace(file)
    elif harm.startswith("byte"):
        at = int(harm.split()[1])
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[len(whole[:at]) + 1 :])
    else:
        file.write_bytes({"cut": whole[:-1], "empty": b"", "longer": whole + b"x"}[harm])
    if restarted:
        folder = PackFolder(tmp_path, MANY_BYTES)
    assert folder.open(NAME) is None
    assert not file.exists()
    made(folder, rows)
    again = folder.open(NAME)
    assert again is not None
    assert again.some_rows(np.arange(5)) == [each.row for each in rows]
    again.close()


def test_a_pack_outlives_its_process_and_what_was_half_written_does_not(tmp_path: Path) -> None:
    made(PackFolder(tmp_path, MANY_BYTES), rows := rows_of(4))
    (tmp_path / ".half").write_bytes(b"x")
    folder = PackFolder(tmp_path, MANY_BYTES)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
    pack = folder.open(NAME)
    assert pack is not None
    folder.drop(NAME)
    assert not list(tmp_path.iterdir())
    assert pack.some_rows(np.arange(4)) == [each.row for each in rows]  # who has opened it reads on
    pack.close()
    assert folder.open(NAME) is None


def test_one_that_is_cut_while_it_is_read_may_be_tried_again(folder: PackFolder, tmp_path: Path) -> None:
    made(folder, rows_of(5))
    pack = folder.open(NAME)
    assert pack is not None
    os.truncate(tmp_path / NAME, 30)
    with pytest.raises(Unavailable):
        pack.some_bodies(np.arange(5))
    pack.close()


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    made(PackFolder(tmp_path, MANY_BYTES), rows_of(9), "a")
    size_bytes = (tmp_path / "a").stat().st_size
    folder = PackFolder(tmp_path, 5 * size_bytes // 2)
    made(folder, rows_of(9), "b")
    for name in ("a", "b", "a"):
        pack = folder.open(name)
        assert pack is not None
        pack.close()
    assert [*PackFolder(tmp_path, MANY_BYTES).names()] == ["b", "a"]  # which a restart remembers
    made(folder, rows_of(9), "c")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "c"} == {*folder.names()}


def test_one_over_the_bound_is_not_kept_nor_tried_again(tmp_path: Path) -> None:
    folder, tries = PackFolder(tmp_path, 1000), []

    def rows() -> Iterator[Sequence[NewRow]]:
        tries.append(1)
        yield from ([each] for each in rows_of(1000))

    for _ in range(2):
        assert sum(1 for _ in folder.make(NAME, rows)) < 20
    assert folder.open(NAME) is None
    assert tries == [1]
    assert not list(tmp_path.iterdir())
    small = PackFolder(tmp_path, 400)
    made(small, rows_of(5))  # whose rows alone are within
    assert small.open(NAME) is None
    assert not list(tmp_path.iterdir())


def test_two_at_once_make_one_and_if_the_first_leaves_the_second_goes_on(folder: PackFolder, tmp_path: Path) -> None:
    rows, tries = rows_of(8), []

    def some() -> Iterator[Sequence[NewRow]]:
        tries.append(1)
        yield rows[:4]
        yield rows[4:]

    leaving, second, third = (folder.make(NAME, some) for _ in range(3))
    for each in (leaving, second, third):
        next(each)
    assert tries == [1]
    assert folder.open(NAME) is None
    leaving.close()  # type: ignore[attr-defined]  # a generator
    next(second)
    next(third)
    assert tries == [1, 1]
    assert sum(1 for _ in second) == 1
    assert not list(third)
    assert tries == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_a_failure_leaves_nothing_behind(folder: PackFolder, tmp_path: Path) -> None:
    def some(error: Exception) -> Iterator[Sequence[NewRow]]:
        yield rows_of(4)
        raise error

    with pytest.raises(NotFound):
        list(folder.make(NAME, lambda: some(NotFound("VERSION_NOT_FOUND", "gone"))))
    list(folder.make(NAME, lambda: some(OSError("no space"))))  # is read without a pack then
    assert not list(tmp_path.iterdir())
    made(folder, rows_of(4))
    assert [*folder.names()] == [NAME]
