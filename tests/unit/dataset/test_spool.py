"""Records go to disk some at a time and are read back as they came."""

import tempfile

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from veneer_dataset.domain import spool
from veneer_dataset.domain.spool import Spool


class _Record(msgspec.Struct, array_like=True):
    number: int
    data: bytes


@given(st.lists(st.integers(0, 200_000), max_size=8), st.lists(st.integers(0, 200_000), max_size=8))
def test_records_are_read_by_place_and_in_order(sizes: list[int], more: list[int]) -> None:
    with tempfile.TemporaryFile() as file:
        records, places = Spool(file, _Record), list[int]()
        for number, size in enumerate(sizes):
            places.append(records.append(_Record(number, b"x" * size)))
        assert [record.number for _, record in records.items()] == list(range(len(sizes)))
        for number, size in enumerate(more, len(sizes)):  # read once, and then more
            places.append(records.append(_Record(number, b"y" * size)))
        assert [place for place, _ in records.items()] == places
        with records.reader() as reader:
            for number, (place, size) in reversed(list(enumerate(zip(places, sizes + more, strict=True)))):
                assert reader.at(place) == _Record(number, (b"x" if number < len(sizes) else b"y") * size)


def test_what_waits_for_the_disk_is_bounded() -> None:
    with tempfile.TemporaryFile() as file:
        records = Spool(file, _Record)
        place = 0
        for number in range(1000):
            place = records.append(_Record(number, b"x" * 1000))
        file.flush()
        assert place - file.tell() <= spool._WRITTEN_AT_ONCE
