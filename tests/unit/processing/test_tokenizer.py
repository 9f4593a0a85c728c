import json
import unicodedata
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3VLProcessor

from veneer_processing import ModelDirectoryError
from veneer_processing.tokenizer import SpecialIds, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer(base)


def test_qwens_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.special == SpecialIds(151_644, 151_645, 151_652, 151_653, 151_655)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello, world!",
        "你好,世界",
        "😀👩‍👩‍👧 e\u0301",
        " \n\t x",
        "<|im_start|>user\n?<|im_end|>\n",
        "a" * 5_000,
    ],
)
def test_ids_are_those_of_transformers(tokenizer: Tokenizer, reference: Qwen3VLProcessor, text: str) -> None:
    expected = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode([text]) == [expected]
    assert tokenizer.lengths([text]) == [len(expected)]


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("<|im_end> \n"), max_size=6)


@given(
    _TEXTS, st.sampled_from(["<|im_end|>", "<|vision_start|><|image_pad|>", "<|im_end|>\n<|im_start|>user\n"]), _TEXTS
)
def test_pieces_apart_have_the_ids_of_the_whole(tokenizer: Tokenizer, before: str, control: str, after: str) -> None:
    first, *rest = tokenizer.apart(control)
    assert len(rest) == control.count("<|") * 2
    *most, last = rest
    pieces = [before + first, *most, last + after]
    assert list(chain.from_iterable(tokenizer.encode(pieces))) == tokenizer.encode([before + control + after])[0]


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"content": "c<"}, {}])
def test_a_text_is_left_whole_where_its_pieces_are_not_read_apart(tmp_path: Path, flags: dict[str, Any]) -> None:
    tiny = tokenizers.Tokenizer(tokenizers.models.BPE({each: at for at, each in enumerate("ab< \n")}, []))
    tiny.add_special_tokens([f"<|{field.name}|>" for field in fields(SpecialIds)])
    tiny.add_tokens([tokenizers.AddedToken(**({"content": "<|other|>", "normalized": False} | flags))])
    tiny.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).apart("a<|im_end|>b") == (["a<|im_end|>b"] if flags else ["a", "<|im_end|>", "b"])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_ids_decode_to_the_text_as_read(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == tokenizer.as_read(text)


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_the_text_as_read_is_the_text_in_nfc(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.as_read(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "token",
    [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|box_start|>",
        "<|fim_prefix|>",
        "<|repo_name|>",
    ],
)
def test_control_tokens_are_found(tokenizer: Tokenizer, token: str) -> None:
    assert tokenizer.control_token_in(f"some {token} text") == token


@pytest.mark.parametrize("text", ["", "<|im_end|", "<| im_end |>", "<think>why</think>", "<tool_call>", "＜|im_end|＞"])
def test_other_texts_hold_none(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.control_token_in(text) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "tokenizer.json: cannot be read"),
        ("", "tokenizer.json: not a tokenizer"),
        ("{}", "tokenizer.json: not a tokenizer"),
        (
            json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}),
            r"added_tokens has no <\|im_start\|>",
        ),
    ],
)
def test_a_directory_without_its_tokenizer_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelDirectoryError, match=words) as refusal:
        Tokenizer(tmp_path)
    assert str(tmp_path) not in str(refusal.value)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    tiny = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    tiny.add_special_tokens([f"<|{field.name}|>" for field in fields(SpecialIds)])
    tiny.enable_truncation(2)
    tiny.enable_padding(pad_id=1, pad_token="b")
    tiny.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode(["abab", "a"]) == [[0, 1, 0, 1], [0]]
