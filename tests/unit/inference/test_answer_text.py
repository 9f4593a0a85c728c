"""Text from tokens as they come: the same as all at once, and never past a stop text."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer_base.unfold import base_directory
from veneer_inference.domain.answer_text import AnswerText, StopTexts
from veneer_inference.domain.token_bytes import TokenBytes
from veneer_processing.errors import ModelDirectoryError
from veneer_processing.tokenizer import Tokenizer

VOCABULARY = 151_669


class Bytes:
    """A vocabulary of the 256 bytes."""

    def __getitem__(self, token_id: int) -> bytes:
        return bytes([token_id])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(base_directory())


@pytest.fixture(scope="module")
def token_bytes() -> TokenBytes:
    return TokenBytes(base_directory())


def pieces(text: AnswerText, ids: Sequence[int]) -> list[str]:
    return [*map(text.push, ids), text.rest()]


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=40))
def test_any_tokens_give_the_text_that_the_tokenizer_gives(
    tokenizer: Tokenizer, token_bytes: TokenBytes, ids: list[int]
) -> None:
    assert "".join(pieces(AnswerText(token_bytes), ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["发票号码：开票日期", "👩‍🚀 und 🇨🇳", "naïve café ﷽", "𠮷野家"])
def test_characters_that_span_tokens_come_whole(tokenizer: Tokenizer, token_bytes: TokenBytes, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    got = pieces(AnswerText(token_bytes), ids)
    assert "".join(got) == text
    assert "\ufffd" not in "".join(got)


def test_a_character_is_held_back_until_its_last_byte() -> None:
    assert pieces(AnswerText(Bytes()), "a😀b".encode()) == ["a", "", "", "", "😀", "b", ""]


def test_bytes_of_an_unfinished_character_are_shown_at_the_end() -> None:
    assert pieces(AnswerText(Bytes()), "a😀".encode()[:-1]) == ["a", "", "", "", "\ufffd"]


def test_a_stop_text_ends_the_answer_before_it() -> None:
    text = AnswerText(Bytes(), ["好吗"])
    got = []
    for byte in "你好吗？".encode():
        got.append(text.push(byte))
        if text.stopped:
            break
    assert "".join(got) + text.rest() == "你"


def test_a_possible_beginning_of_a_stop_text_is_held_back_and_released() -> None:
    stops = StopTexts(["END", "\n\n"])
    assert [stops.push(piece) for piece in ("one E", "N", "C", " two\n", "x")] == ["one ", "", "ENC", " two", "\nx"]
    assert stops.push("E") == ""
    assert stops.rest() == "E"


@pytest.mark.parametrize(
    ("stops", "text", "before"),
    [
        (["cd", "abcdef"], "xxabcdef", "xxab"),  # complete first
        (["bc", "abc"], "xabcx", "x"),  # at one place: the longest
        (["aab"], "aaab", "a"),
        (["\ufffd"], "\ufffd", ""),
    ],
)
def test_the_stop_text_that_is_complete_first_counts(stops: list[str], text: str, before: str) -> None:
    cutter = StopTexts(stops)
    assert cutter.push(text) == before
    assert cutter.found


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
)
def test_chopping_changes_nothing(text: str, stops: list[str], cuts: list[int]) -> None:
    def run(parts: Sequence[str]) -> str:
        cutter, got = StopTexts(stops), ""
        for part in parts:
            got += cutter.push(part)
            if cutter.found:
                return got
        return got + cutter.rest()

    parts, at = [], 0
    for cut in cuts:
        parts.append(text[at : at + cut])
        at += cut
    whole = run(list(text))
    assert run(parts) == run([text]) == whole
    assert not any(stop in whole for stop in stops)


def test_a_stop_text_in_the_last_bytes_counts_too() -> None:
    text = AnswerText(Bytes(), ["\ufffd"])
    assert text.push(0xE4) == ""
    assert text.rest() == ""
    assert text.stopped


def test_every_token_has_the_bytes_that_the_tokenizer_says(tokenizer: Tokenizer, token_bytes: TokenBytes) -> None:
    for token_id in range(0, VOCABULARY, 97):
        assert token_bytes[token_id].decode("utf-8", "replace") == tokenizer.decode([token_id])
    assert token_bytes[10**9] == b""


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model": {"vocab": {}}}', '{"model": {"vocab": {}}, "decoder": {"type": "WordPiece"}}']
)
def test_another_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelDirectoryError, match=r"tokenizer\.json"):
        TokenBytes(tmp_path)
