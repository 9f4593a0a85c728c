"""Steps of the engine to pieces of an answer, where stop texts and the ends of tokens do not meet."""

from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from veneer_inference.api.answers import Piece, _texts
from veneer_inference.ports import Step

BYTES = {0: b"<end>", 1: b"one ", 2: b"two ", 3: b"three", 4: "😀".encode()[:2]}


async def pieces(stops: Sequence[str], *steps: Step) -> list[Piece]:
    async def given() -> AsyncIterator[tuple[float, Step]]:
        for step in steps:
            yield 0.0, step

    call: Any = SimpleNamespace(started_s=0.0)
    pinned: Any = SimpleNamespace(base=SimpleNamespace(token_bytes=BYTES, stop_ids=(0,)))
    draw: Any = SimpleNamespace(stops=stops)
    return [piece async for piece in _texts(call, given(), pinned, draw)]


@pytest.mark.parametrize(
    ("stops", "steps", "text", "token_ids", "finish"),
    [
        # What was held back for a stop text that did not come is said at the end.
        (["three!"], [Step((1, 2)), Step((3, 0), finish="stop")], "one two three", (1, 2, 3, 0), "stop"),
        (["three!"], [Step((1, 3), finish="length")], "one three", (1, 3), "length"),
        # Of tokens that came together none after the stop text counts.
        (["two"], [Step((1, 2, 3, 3)), Step((0,), finish="stop")], "one ", (1, 2), "stop"),
        # A stop text in the last bytes, which are no character.
        (["\ufffd"], [Step((1, 4), finish="length")], "one ", (1, 4), "stop"),
        ([], [Step((1, 4), finish="length")], "one \ufffd", (1, 4), "length"),
    ],
)
async def test_an_answer_ends_where_its_text_does(
    stops: list[str], steps: list[Step], text: str, token_ids: tuple[int, ...], finish: str
) -> None:
    found = await pieces(stops, *steps)
    assert "".join(each.text for each in found) == text
    assert tuple(token for each in found for token in each.token_ids) == token_ids
    assert [each.finish for each in found] == [""] * (len(found) - 1) + [finish]
    assert found[-1].answer_tokens == len(token_ids)
