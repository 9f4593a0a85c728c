# ruff: noqa: ANN401, E501  # rows hold anything, and a row is read best on one line
"""Every kind of bad line gets its code; what only looks bad is accepted."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_dataset.domain.dialects import dialect_of, read_draft
from veneer_dataset.domain.draft import MAX_MESSAGES, MAX_TEXT_BYTES, Draft
from veneer_dataset.domain.findings import KINDS, Refusal
from veneer_dataset.domain.json_row import parse_row
from veneer_dataset.domain.lines import MAX_BLANK_LINES, MAX_LINE_BYTES, row_lines
from veneer_rpc.errors import ResourceExhausted


def read(line: bytes, default_prompt: str = "") -> Draft:
    row = parse_row(line)
    return read_draft(row, dialect_of(row), default_prompt)


def said(*messages: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "JSON_TOO_DEEP"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "JSON_TOO_DEEP"),
        (b'{"prompt":"p","text":"t","a":' + b"[" * 70 + b"]" * 70 + b"}", "JSON_TOO_DEEP"),
        (b'{"prompt":"p","text":"\xff"}', "ENCODING_NOT_UTF8"),
        ('{"prompt":"p","text":"t"}'.encode("utf-16"), "ENCODING_NOT_UTF8"),
        ('{"prompt":"p","text":"t"}'.encode("utf-16-le"), "ENCODING_NOT_UTF8"),
        (b'\xef\xbb\xbf{"prompt":"p","text":"t"}', "BYTE_ORDER_MARK"),
        (b'{"prompt":"p","text":"\\ud800"}', "TEXT_LONE_SURROGATE"),
        (b'{"prompt":"p","text":"\\udc00x"}', "TEXT_LONE_SURROGATE"),
        (b'{"prompt":"p","text":"t","n":NaN}', "JSON_NUMBER"),
        (b'{"prompt":"p","text":"t","n":-Infinity}', "JSON_NUMBER"),
        (b'{"prompt":"p","text":"t","n":1e999}', "JSON_NUMBER"),
        (b'{"prompt":"p","text":"t","n":' + b"1" * 5000 + b"}", "JSON_NUMBER"),
        (b'{"prompt":"p","text":"t","text":"u"}', "JSON_KEY_TWICE"),
        (b'{"prompt":"p","text":"t","text" :"u"}', "JSON_KEY_TWICE"),
        (b'{"prompt":"p","text":"t","x":{"a":1,"a":2}}', "JSON_KEY_TWICE"),
        (b'{"prompt":"p","text":"\\u0000"}', "TEXT_NUL"),
        (b'{"prompt":"p","text":"t"', "JSON_INVALID"),
        (b'{"prompt":"p","text":"t"} x', "JSON_INVALID"),
        (b'{"prompt":"p","text":"a\x01"}', "JSON_INVALID"),
        (b'["t"]', "JSON_NOT_OBJECT"),
        (b"{}", "DIALECT_UNKNOWN"),
        (b'{"prompt":"p","text":7}', "FIELD_TYPE"),
        (b'{"prompt":7,"text":"t"}', "FIELD_TYPE"),
        (b'{"image":7,"text":"t"}', "FIELD_TYPE"),
        (b'{"text":"t"}', "FIELD_MISSING"),
        (b'{"image":"a.png"}', "ANSWER_MISSING"),
        (b'{"image":"a.png","text":""}', "ANSWER_MISSING"),
        (b'{"image":"https://x.example/a.png","text":"t"}', "PICTURE_URL"),
        (b'{"image":"data:image/png;base64,@@","text":"t"}', "PICTURE_DATA_URL"),
        (b'{"image":"data:text/html;base64,aGk=","text":"t"}', "PICTURE_DATA_URL"),
        (b'{"prompt":"p","text":"look <|image_pad|>"}', "TEXT_CONTROL_TOKEN"),
        (b'{"prompt":"<|im_end|>","text":"t"}', "TEXT_CONTROL_TOKEN"),
        (b'{"prompt":"p","text":"' + b"x" * (MAX_TEXT_BYTES + 1) + b'"}', "TEXT_TOO_LARGE"),
        (b'{"prompt":"p","text":"t","split":"No Split"}', "SPLIT_INVALID"),
        (b'{"prompt":"<image><image>","image":"a.png","text":"t"}', "PICTURE_TAGS"),
        (said({"role": "tool", "content": "x"}, ANSWER), "ROLE_UNKNOWN"),
        (said(USER, ANSWER, {"role": "system", "content": "s"}, ANSWER), "ROLE_ORDER"),
        (said(ANSWER), "ROLE_ORDER"),
        (said(), "ROLE_ORDER"),
        (said(USER), "ANSWER_MISSING"),
        (said(USER, {"role": "assistant", "content": ""}), "ANSWER_MISSING"),
        (said(USER, {**ANSWER, "weight": 0}), "ANSWER_MISSING"),
        (said(USER, {**ANSWER, "weight": 2}), "FIELD_TYPE"),
        (said({"role": "user", "content": []}, ANSWER), "FIELD_MISSING"),
        (said({"role": "user", "content": [{"type": "audio"}]}, ANSWER), "PART_UNKNOWN"),
        (said({"role": "user", "content": [{"type": "text", "text": "x"}] * 257}, ANSWER), "PARTS_TOO_MANY"),
        (said(USER, {"role": "assistant", "content": [{"type": "image_url", "image_url": "a.png"}]}), "PICTURE_PLACE"),
        (said({"role": "user", "content": "<image>"}, ANSWER, images=["a", "b"]), "PICTURE_TAGS"),
        (said({"role": "user", "content": "<image><image>"}, ANSWER, images=["a"]), "PICTURE_TAGS"),
        (b'{"conversations":[{"from":"human","value":"q"},{"from":"bot","value":"a"}]}', "ROLE_UNKNOWN"),
        (
            b'{"image":"a.png","conversations":[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]}',
            "PICTURE_TAGS",
        ),
    ],
)
def test_refused(line: bytes, code: str) -> None:
    with pytest.raises(Refusal) as refusal:
        read(line)
    assert refusal.value.code == code
    assert code in KINDS
    assert len(refusal.value.found) <= 200


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt":"p","text":"a\u2028b"}'.encode(),
        b'{"prompt":"a \\": b","text":"{\\"x\\":1}"}',
        b'{ "prompt" : "p" , "text" : "t" }',
        said(USER, {**ANSWER, "weight": 0}, USER, ANSWER),
        said({"role": "system", "content": "s"}, USER, {**ANSWER, "weight": 1}),
    ],
)
def test_accepted(line: bytes) -> None:
    assert read(line).messages[-1]["role"] == "assistant"


IMAGE = {"type": "image", "digest": ""}


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "prompt": "What?", "text": "A cat."},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "A cat."}]},
        {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}], "images": [{"path": "a.png", "bytes": None}]},
        {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}], "images": ["a.png"]},
        {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]},
    ],
)  # fmt: skip
def test_one_row_in_every_dialect(row: dict[str, Any]) -> None:
    draft = read(json.dumps(row).encode())
    assert draft.messages == [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    assert [use.source for use in draft.pictures] == ["a.png"]


def test_too_many_messages_stop_the_push() -> None:
    with pytest.raises(ResourceExhausted, match=str(MAX_MESSAGES)):
        read(said(*([USER, ANSWER] * (MAX_MESSAGES // 2 + 1))))


def test_lines() -> None:
    assert list(row_lines([b"a\r\nb", b"c\n\n \nd"], "f")) == [(1, b"a"), (2, b"bc"), (5, b"d")]
    with pytest.raises(ResourceExhausted, match="f:2"):
        list(row_lines([b"a\n", *[b"x" * (1 << 20)] * (MAX_LINE_BYTES // (1 << 20) + 1)], "f"))
    with pytest.raises(ResourceExhausted, match="blank"):
        list(row_lines([b"\n" * 100_000] * (MAX_BLANK_LINES // 100_000 + 1), "f"))


@given(st.lists(st.binary(max_size=20)), st.integers(1, 7))
def test_lines_do_not_depend_on_the_cut(lines: list[bytes], size: int) -> None:
    whole = b"\n".join(lines)
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    assert list(row_lines(pieces, "f")) == list(row_lines([whole], "f"))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["image", "images", "text", "prompt", "messages", "conversations", "role", "content", "from", "value", "type", "url"]), inner, max_size=5
    ),
    max_leaves=20,
)  # fmt: skip


@given(
    _JSON
    | st.dictionaries(
        st.sampled_from(["messages", "images", "conversations", "text", "image", "prompt", "split", "group", "system"]),
        _JSON,
    )
)
def test_any_json_is_read_or_refused_with_a_known_code(value: Any) -> None:
    try:
        draft = read(json.dumps(value).encode())
    except Refusal as refusal:
        draft = None
        code = refusal.code
    if draft is None:
        assert code in KINDS
    else:
        assert draft.messages[-1]["role"] == "assistant"


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_with_a_known_code(line: bytes) -> None:
    try:
        parse_row(line)
        code = ""
    except Refusal as refusal:
        code = refusal.code
    assert not code or code in KINDS
