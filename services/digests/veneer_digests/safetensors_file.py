"""The safetensors format, read with every check and without torch.

Owns the header and the whereabouts of each tensor's bytes (https://huggingface.co/docs/safetensors).
What the tensors mean, and whether their numbers are finite, is the caller's matter.
"""

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer_digests.errors import NotCanonicalError, SafetensorsError, shown
from veneer_digests.jcs import parse_json
from veneer_digests.preimage import utf8

MAX_HEADER_BYTES = 8 << 20
"""Room for 60,000 tensors; the format's own bound of 100 MB would let a file cost gigabytes to parse."""

MAX_DIMENSIONS = 32
_MAX_DIMENSION = 2**53 - 1
_PIECE_BYTES = 4 << 20

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one element, by the format's name of the dtype."""


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where a tensor lies: bytes [start, end) of the file, little-endian, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of a file by name, in the order of their bytes, and the file's own metadata."""

    slots: dict[str, TensorSlot]
    metadata: dict[str, str]


def tensor_size_bytes(dtype: object, shape: object, place: str) -> int:
    """Bytes of a tensor; raises `SafetensorsError` for an unknown dtype, a bad shape, a part of a byte."""
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise SafetensorsError(f"{place}: unknown dtype {shown(dtype)}")
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMENSIONS:
        raise SafetensorsError(f"{place}: shape must be a list of at most {MAX_DIMENSIONS} dimensions")
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension <= _MAX_DIMENSION:
            raise SafetensorsError(f"{place}: a dimension must be in [0, 2^53), got {shown(dimension)}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise SafetensorsError(f"{place}: {bits} bits of {dtype} fill no whole number of bytes")
    return bits // 8


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check the header: afterwards every slot lies in the file, and the slots tile its data exactly.

    Raises:
        SafetensorsError: a header longer than `MAX_HEADER_BYTES` or than the file, not JSON in UTF-8, with a
            name twice, a field missing or unknown, or ranges that overlap, leave a gap or do not fit the
            shape.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise SafetensorsError(f"file of {len(start)} bytes is too short for a header's length (8)")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise SafetensorsError(
                f"header of {header_bytes} bytes: at most {MAX_HEADER_BYTES}, the file holds {file_bytes - 8}"
            )
        header = _parse(file.read(header_bytes))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsError("__metadata__ must be an object of strings")
    data_start = 8 + header_bytes
    slots = sorted(
        (_slot(name, entry, data_start) for name, entry in header.items()),
        key=lambda slot: (slot.start, slot.end),
    )
    position = data_start
    for slot in slots:
        if slot.start != position:
            problem = "overlaps the tensor before it" if slot.start < position else "leaves a gap before it"
            raise SafetensorsError(f"tensor {shown(slot.name)} {problem}")
        position = slot.end
    if position != file_bytes:
        raise SafetensorsError(f"tensors end at byte {position}, the file at {file_bytes}")
    return SafetensorsHeader({slot.name: slot for slot in slots}, metadata)


def read_slot(descriptor: int, slot: TensorSlot) -> Iterator[memoryview]:
    """A tensor's bytes in pieces of at most 4 MiB; each piece is good until the next is asked for.

    Reads rather than maps: a file cut short under a mapping would kill the process with SIGBUS. Threads may
    share the descriptor.

    Raises:
        SafetensorsError: the file ends before the tensor does.
    """
    buffer = memoryview(bytearray(min(_PIECE_BYTES, slot.size_bytes)))
    offset = slot.start
    while offset < slot.end:
        count = os.preadv(descriptor, [buffer[: slot.end - offset]], offset)
        if count == 0:
            raise SafetensorsError(f"file ends at byte {offset}, inside tensor {shown(slot.name)}")
        yield buffer[:count]
        offset += count


def _parse(data: bytes) -> dict[str, Any]:
    if not data.startswith(b"{"):
        raise SafetensorsError(f"header must start with a brace, starts with {shown(ascii(data[:8]))}")
    try:
        header: dict[str, Any] = parse_json(data)  # it starts with a brace, so it is an object
        for name in header:
            utf8(name, "a tensor's name")
    except NotCanonicalError as error:
        raise SafetensorsError(f"header: {error}") from error
    return header


def _slot(name: str, entry: object, data_start: int) -> TensorSlot:
    place = f"tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(f"{place} must have dtype, shape and data_offsets, and no more")
    size_bytes = tensor_size_bytes(entry["dtype"], entry["shape"], place)
    match entry["data_offsets"]:
        case [int() as start, int() as end] if type(start) is type(end) is int and 0 <= start <= end:
            pass
        case _:
            raise SafetensorsError(f"{place}: data_offsets must be two integers, the first not above the second")
    if end - start != size_bytes:
        raise SafetensorsError(f"{place}: {shown(end - start)} bytes in the file, {shown(size_bytes)} by its shape")
    return TensorSlot(name, entry["dtype"], tuple(entry["shape"]), data_start + start, data_start + end)
