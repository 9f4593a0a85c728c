"""The course of training jobs as TensorBoard event files: one store, which `tensorboard --logdir` reads too.

A file is a sequence of TFRecords (length, checksum, bytes, checksum), each a TensorBoard `Event` with one scalar for
each figure (https://github.com/tensorflow/tensorboard, `compat/proto/event.proto` and `summary/writer/`; the masked
checksum: https://www.tensorflow.org/tutorials/load_data/tfrecord). Every process begins a file of its own, since the
last record of a dead one may be cut; steps that are done again after a resume come again, and the later point counts.
"""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from veneer_trainer.domain.jobs import Point
from veneer_trainer.domain.work import WorkRef

_log = structlog.get_logger(__name__)
_TAGS = {name: f"train/{name}" for name in Point.FIGURES} | {"validation_loss": "validation/loss"}
_NAMES = {tag: name for name, tag in _TAGS.items()}
_POLYNOMIAL = 0x82F63B78  # CRC-32C, reversed
_MASK_DELTA = 0xA282EAD8


class EventFiles:
    """The Curves of a folder; see `ports.Curves`.

    Args:
        root: a folder for each tenant, in it one for each job.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own = f"events.out.tfevents.{int(time.time()):010}.veneer.{os.getpid()}"
        self._broken = 0  # files whose last record may be cut

    def append(self, job: WorkRef, points: Iterable[Point]) -> None:
        """See Curves."""
        path = self._folder(job) / f"{self._own}.{self._broken}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                head = b"" if file.tell() else _record(_Event(wall_time=time.time(), file_version="brain.Event:2"))
                file.write(head + b"".join(_record(_event(point)) for point in points))
        except OSError as error:  # a chart is not worth an attempt
            self._broken += 1
            _log.warning("curve not written", job=job.name, problem=str(error))

    def read(self, job: WorkRef) -> list[Point]:
        """See Curves."""
        points: dict[int, Point] = {}
        for path in sorted(self._folder(job).glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
            points |= {point.step: point for point in _points(path.read_bytes())}
        return [points[step] for step in sorted(points)]

    def forget(self, job: WorkRef) -> None:
        """See Curves."""
        shutil.rmtree(self._folder(job), ignore_errors=True)

    def _folder(self, job: WorkRef) -> Path:
        return self._root / job.tenant / job.id


def _event_class() -> Any:  # noqa: ANN401  # a class made at run time
    """TensorBoard's `Event`, as far as it is used here, in a pool of its own."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="event.proto", package="tensorboard", syntax="proto3")
    fields: Mapping[str, list[tuple[str, int, int, str]]] = {
        "Value": [("tag", 1, kinds.TYPE_STRING, ""), ("simple_value", 2, kinds.TYPE_FLOAT, "")],
        "Summary": [("value", 1, kinds.TYPE_MESSAGE, "Value")],
        "Event": [
            ("wall_time", 1, kinds.TYPE_DOUBLE, ""),
            ("step", 2, kinds.TYPE_INT64, ""),
            ("file_version", 3, kinds.TYPE_STRING, ""),
            ("summary", 5, kinds.TYPE_MESSAGE, "Summary"),
        ],
    }
    for message, its in fields.items():
        described = file.message_type.add(name=message)
        for name, number, kind, of in its:
            label = kinds.LABEL_REPEATED if of == "Value" else kinds.LABEL_OPTIONAL
            type_name = f".tensorboard.{of}" if of else None
            described.field.add(name=name, number=number, type=kind, label=label, type_name=type_name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorboard.Event"))


_Event = _event_class()


def _event(point: Point) -> Any:  # noqa: ANN401  # an Event
    figures = ((tag, getattr(point, name)) for name, tag in _TAGS.items())
    values = [{"tag": tag, "simple_value": value} for tag, value in figures if value is not None]
    return _Event(wall_time=point.measured_s, step=point.step, summary={"value": values})


def _points(data: bytes) -> Iterator[Point]:
    for body in _bodies(data):
        event = _Event.FromString(body)
        if event.HasField("summary"):
            figures = {_NAMES[value.tag]: value.simple_value for value in event.summary.value if value.tag in _NAMES}
            yield Point(event.step, event.wall_time, **figures)


def _record(message: Any) -> bytes:  # noqa: ANN401  # an Event
    body: bytes = message.SerializeToString()
    length = struct.pack("<Q", len(body))
    return b"".join((length, _checksum(length), body, _checksum(body)))


def _bodies(data: bytes) -> Iterator[bytes]:
    """The records up to the first that is cut or damaged."""
    start = 0
    while len(data) - start >= 16:
        (size,) = struct.unpack_from("<Q", data, start)
        body = data[start + 12 : start + 12 + size]
        if data[start + 12 + size : start + 16 + size] != _checksum(body):
            return
        yield body
        start += 16 + size


def _checksum(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF)


def _table_entry(byte: int) -> int:
    for _ in itertools.repeat(None, 8):
        byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = tuple(map(_table_entry, range(256)))
