"""Curves: which points there are, and the event files that hold them, read by another hand."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from veneer_trainer.adapters.event_files import EventFiles, _checksum
from veneer_trainer.domain.curves import points_of, thinned
from veneer_trainer.domain.jobs import Point, Progress
from veneer_trainer.domain.work import WorkKind, WorkRef

JOB = WorkRef("acme", WorkKind.TRAINING, "a")
PROGRESS = Progress(1, 10, 0.5, 2.0, 1e-4, 0.25, 100.0, 5.0, 1 << 30, 1.0, 1e9)
POINTS = [Point(step, 1e9 + step, loss=2.0 / step, validation_loss=0.5 if step == 2 else None) for step in (1, 2, 4)]


def test_a_validation_loss_is_a_point_where_it_is_new() -> None:
    losses = [None, 0.75, 0.75, 0.5]
    figures = [replace(PROGRESS, step=step, validation_loss=loss) for step, loss in enumerate(losses, 1)]
    assert [point.validation_loss for point in points_of(figures, None)] == [None, 0.75, None, 0.5]
    assert [point.validation_loss for point in points_of(figures[2:], figures[1])] == [None, 0.5]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 11, 1000])
def test_thinned_points_keep_both_ends_and_validations(count: int) -> None:
    points = [Point(step, 0.0, validation_loss=1.0 if step == 7 else None) for step in range(count)]
    kept = thinned(points, 10)
    assert len(kept) <= 11
    assert kept[:1] == points[:1]
    assert kept[-1:] == points[-1:]
    assert len(kept) == count or Point(7, 0.0, validation_loss=1.0) in kept


def test_what_was_written_is_read_and_later_points_count(tmp_path: Path) -> None:
    files = EventFiles(tmp_path)
    assert files.read(JOB) == []
    files.append(JOB, POINTS[:2])
    files.append(JOB, POINTS[2:])
    assert files.read(JOB) == POINTS
    again = replace(POINTS[1], loss=0.125)
    files.append(JOB, [again])
    assert files.read(JOB) == [POINTS[0], again, POINTS[2]]
    assert files.read(replace(JOB, tenant="other")) == []
    files.forget(JOB)
    assert files.read(JOB) == []
    assert not list(tmp_path.rglob("events*"))


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_cut_file_gives_what_is_whole_and_the_next_process_begins_another(tmp_path: Path, cut: int) -> None:
    files = EventFiles(tmp_path)
    files.append(JOB, POINTS)
    (path,) = tmp_path.rglob("events*")
    path.write_bytes(path.read_bytes()[:-cut])
    assert files.read(JOB) == POINTS[:2]
    path.rename(path.with_name("events.out.tfevents.0000000001.veneer.1.0"))
    files.append(JOB, POINTS[2:])
    assert files.read(JOB) == POINTS


def test_a_full_disk_costs_points_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "acme").write_text("no folder")
    EventFiles(tmp_path).append(JOB, POINTS)
    (tmp_path / "acme").unlink()


def test_the_checksum_is_the_masked_one_of_tfrecord() -> None:
    (masked,) = struct.unpack("<I", _checksum(b"123456789"))
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    assert ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF == 0xE3069283  # CRC-32C's check value, RFC 3720


def test_the_file_is_tensorboards(tmp_path: Path) -> None:
    """Fields by their numbers in event.proto and summary.proto: 1 wall time, 2 step, 3 version, 5 summary."""
    EventFiles(tmp_path).append(JOB, POINTS[:1])
    (path,) = tmp_path.rglob("events.out.tfevents.*")
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    head, rest = data[12 : 12 + size], data[16 + size :]
    assert head[0] == 0x09
    assert head[9:] == b"\x1a\x0dbrain.Event:2"
    (size,) = struct.unpack_from("<Q", rest)
    body = rest[12 : 12 + size]
    assert struct.unpack_from("<d", body, 1) == (1e9 + 1,)
    assert body[9:12] == b"\x10\x01\x2a"
    assert body[12] == len(body) - 13  # each length fits into one byte
    value, tag = b"\x0a\x11", b"\x0a\x0atrain/loss"
    assert body[13:] == value + tag + b"\x15" + struct.pack("<f", 2.0)
