"""Pictures as uploaded are read where all calls are served only as far as they are in memory."""

import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from veneer_dataset.api.handover import drawn
from veneer_dataset.domain.blobs import Blob
from veneer_dataset.domain.examples import Examples, PictureForm, Piece, Wanted
from veneer_dataset.domain.packed import PackedPicture, PackedRow, PictureHole

ROWS = 40
SIZE_BYTES = 256 * 1024
LOOP = threading.current_thread()


class Rows:
    """Rows of one picture each; reading them waits for a disk."""

    def some_rows(self, positions: Sequence[int]) -> list[PackedRow]:
        assert threading.current_thread() is not LOOP
        return [
            PackedRow(b"row %d" % each, [PackedPicture(PictureHole(f"{each:064}", 0, 0), SIZE_BYTES, str(each))])
            for each in positions[:7]
        ]

    def close(self) -> None:
        pass


class Blobs:
    """Some are in memory, the others on a disk; notes who read which."""

    def __init__(self, cold: set[str]) -> None:
        self.cold, self.read = cold, dict[str, threading.Thread]()

    def at_hand(self, location: str, into: memoryview) -> bool:
        if location not in self.cold:
            into[:] = self._content(location)
        return location not in self.cold

    def whole(self, blob: Blob) -> bytes:
        assert threading.current_thread() is not LOOP
        return self._content(blob.location)

    def _content(self, location: str) -> bytes:
        self.read[location] = threading.current_thread()
        return location.encode().ljust(SIZE_BYTES)


def opened(*_: object) -> Any:  # noqa: ANN401
    yield
    return Rows()


@pytest.mark.parametrize("cold", [set(), {"9", "30"}, {str(each) for each in range(ROWS)}])
async def test_only_what_is_in_memory_is_read_on_the_loop(cold: set[str]) -> None:
    blobs: Any = Blobs(cold)
    stored: Any = SimpleNamespace(key=1, split_bounds=lambda split: (0, ROWS))
    versions: Any = SimpleNamespace(exists=lambda key: True)
    sources: Any = SimpleNamespace(opened=opened)
    examples = Examples(versions, blobs, None, sources)  # type: ignore[arg-type]  # nothing is resized
    wanted = Wanted("train", None, 0, 0, PictureForm.ORIGINAL, None, batched=False)

    def read() -> Iterator[tuple[int, list[bytes], list[int]] | None]:
        for piece in examples.read("t", stored, wanted):
            if piece is None:
                yield None
            else:
                assert isinstance(piece, Piece)
                yield piece.first, list(piece.bodies), [int(bytes(content)) for ((_, content),) in piece.contents]

    pieces = [piece async for piece in drawn(read, in_threads=False)]
    assert [body for _, bodies, _ in pieces for body in bodies] == [b"row %d" % each for each in range(ROWS)]
    assert [content for _, _, contents in pieces for content in contents] == list(range(ROWS))
    on_loop = sum(thread is LOOP for thread in blobs.read.values())
    assert (on_loop > ROWS // 3) == (len(cold) < 3), on_loop
    assert np.diff([first for first, _, _ in pieces]).tolist() == [len(bodies) for _, bodies, _ in pieces[:-1]]
