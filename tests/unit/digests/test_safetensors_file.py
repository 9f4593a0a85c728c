import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from veneer_digests import SafetensorsError, TensorSlot, read_safetensors_header, read_slot
from veneer_digests.safetensors_file import MAX_HEADER_BYTES

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}

NAMES = st.text().filter(lambda name: name != "__metadata__")  # the format keeps that name for itself


def write(path: Path, header: object, data: bytes = b"", *, header_bytes: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data)
    return path


def read_all(path: Path, slot: TensorSlot) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return b"".join(bytes(piece) for piece in read_slot(descriptor, slot))
    finally:
        os.close(descriptor)


@given(
    st.dictionaries(NAMES, st.binary(max_size=40), min_size=1, max_size=6),
    st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_reads_what_the_safetensors_library_writes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, bytes], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in tensors.items()}
    save_file(arrays, path, metadata)
    header = read_safetensors_header(path)
    assert header.metadata == metadata
    assert {name: read_all(path, slot) for name, slot in header.slots.items()} == tensors
    assert all(slot.dtype == "U8" and slot.shape == (len(tensors[name]),) for name, slot in header.slots.items())


def test_a_tensor_longer_than_a_piece_comes_whole(tmp_path: Path) -> None:
    data = os.urandom((9 << 20) + 5)
    header = {"t": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}
    path = write(tmp_path / "x.safetensors", header, data)
    assert read_all(path, read_safetensors_header(path).slots["t"]) == data


def test_scalars_and_nothing_are_tensors(tmp_path: Path) -> None:
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "nothing": {"dtype": "F32", "shape": [0, 2**53 - 1], "data_offsets": [4, 4]},
        "packed": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [4, 7]},
    }
    slots = read_safetensors_header(write(tmp_path / "x.safetensors", header, bytes(7))).slots
    assert {name: slot.size_bytes for name, slot in slots.items()} == {"scalar": 4, "nothing": 0, "packed": 3}


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"a": A}, bytes(7), "tensors end at byte .*, the file at"),
        ({"a": A}, bytes(9), "tensors end at byte .*, the file at"),
        ({"a": A, "b": B | {"data_offsets": [7, 10]}}, bytes(11), "tensor 'b' overlaps"),
        ({"a": A, "b": A}, bytes(8), "tensor 'b' overlaps"),
        ({"a": A, "b": B | {"data_offsets": [9, 12]}}, bytes(12), "tensor 'b' leaves a gap"),
        ({"b": B}, bytes(11), "tensor 'b' leaves a gap"),
        ({"a": A | {"data_offsets": [0, 4]}}, bytes(4), "4 bytes in the file, 8 by its shape"),
        ({"a": A | {"data_offsets": [8, 0]}}, bytes(8), "data_offsets must be two integers"),
        ({"a": A | {"data_offsets": [-8, 0]}}, bytes(8), "data_offsets must be two integers"),
        ({"a": A | {"data_offsets": [0, 8.0]}}, bytes(8), "data_offsets must be two integers"),
        ({"a": A | {"data_offsets": [False, 8]}}, bytes(8), "data_offsets must be two integers"),
        ({"a": A | {"data_offsets": [0, 4, 8]}}, bytes(8), "data_offsets must be two integers"),
        ({"a": A | {"data_offsets": [2**63, 2**63 + 8]}}, bytes(8), "leaves a gap"),
        ({"a": A | {"dtype": "F33"}}, bytes(8), "unknown dtype 'F33'"),
        ({"a": A | {"dtype": ["F32"]}}, bytes(8), "unknown dtype list"),
        ({"a": A | {"shape": [-2]}}, bytes(8), r"dimension must be in \[0, 2\^53\), got -2"),
        ({"a": A | {"shape": [2.0]}}, bytes(8), r"dimension must be in \[0, 2\^53\), got 2.0"),
        ({"a": A | {"shape": [2, True]}}, bytes(8), r"dimension must be in \[0, 2\^53\), got True"),
        ({"a": A | {"shape": [2**53]}}, bytes(8), r"dimension must be in"),
        ({"a": A | {"shape": 2}}, bytes(8), "shape must be a list"),
        ({"a": A | {"shape": [1] * 33}}, bytes(8), "at most 32 dimensions"),
        ({"a": A | {"shape": [2**52] * 32}}, bytes(8), "8 bytes in the file, an integer of 16"),
        ({"a": A | {"dtype": "F4", "shape": [3]}}, bytes(8), "12 bits of F4 fill no whole number of bytes"),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "must have dtype, shape and data_offsets"),
        ({"a": A | {"extra": 1}}, bytes(8), "must have dtype, shape and data_offsets"),
        ({"a": [A]}, bytes(8), "must have dtype, shape and data_offsets"),
        ({"__metadata__": {"rank": 8}}, b"", "__metadata__ must be an object of strings"),
        ({"__metadata__": []}, b"", "__metadata__ must be an object of strings"),
        (
            b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}",
            bytes(8),
            "'a' is there twice",
        ),
        (b'{"\\ud800":' + json.dumps(A).encode() + b"}", bytes(8), "lone surrogate"),
        (b"[]", b"", r"must start with a brace"),
        (b" {}", b"", r"must start with a brace"),
        (b"", b"", r"must start with a brace"),
        (b"{" * 100_000, b"", "not JSON in UTF-8"),
        (b'{"a":' * 100_000, b"", "not JSON in UTF-8"),
        (b'{"a":NaN}', b"", "NaN is no number"),
        (b'{"a":' + b"1" * 5000 + b"}", b"", "not JSON in UTF-8"),
        (b'{"\xff":1}', b"", "not JSON in UTF-8"),
    ],
)
def test_refuses(tmp_path: Path, header: object, data: bytes, problem: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(SafetensorsError, match=problem) as caught:
        read_safetensors_header(path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("header_bytes", [2**63, 2**64 - 1, MAX_HEADER_BYTES + 1, 3])
def test_a_header_longer_than_the_file_or_the_limit_is_not_read(tmp_path: Path, header_bytes: int) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", header_bytes=header_bytes)
    with pytest.raises(SafetensorsError, match=f"header of {header_bytes} bytes: at most {MAX_HEADER_BYTES}"):
        read_safetensors_header(path)


def test_a_header_over_the_limit_is_refused_though_the_file_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path, b"{}", header_bytes=MAX_HEADER_BYTES + 1)
    os.truncate(path, MAX_HEADER_BYTES + 100)
    with pytest.raises(SafetensorsError, match="at most"):
        read_safetensors_header(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00"])
def test_a_file_that_is_too_short_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsError, match=f"file of {len(content)} bytes is too short"):
        read_safetensors_header(path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x80\x04\x95" + bytes(100))
    with pytest.raises(SafetensorsError, match="header"):
        read_safetensors_header(path)


def test_a_file_cut_short_under_the_reader_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": A}, bytes(8))
    slot = read_safetensors_header(path).slots["a"]
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(SafetensorsError, match="inside tensor 'a'"):
        read_all(path, slot)
