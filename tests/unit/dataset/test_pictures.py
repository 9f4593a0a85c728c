"""The table of a version's pictures."""

import hashlib

import numpy as np

from veneer_dataset.domain.pictures import PictureTable


def test_chosen_pictures_are_sorted_and_found() -> None:
    digests = [hashlib.sha256(str(number).encode()).digest() for number in range(100)]
    digests += [bytes(32), b"\xff" * 32, b"\x80" + bytes(31), bytes(31) + b"\x01"]  # and what order may stumble over
    table = PictureTable()
    for digest in digests:
        table.index(digest)
    which_N = np.arange(len(digests)) % 3 > 0
    chosen = table.chosen(which_N)
    right = sorted(digest.hex() for digest, wanted in zip(digests, which_N, strict=True) if wanted)
    assert list(chosen) == right
    assert chosen[2:5] == right[2:5]
    assert [digest.hex() in chosen for digest in digests] == which_N.tolist()
    assert list(PictureTable().chosen(np.zeros(0, np.bool_))) == []
