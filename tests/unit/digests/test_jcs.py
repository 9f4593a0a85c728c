import json
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_digests import DigestError, NotCanonicalError, canonical_json, parse_json
from veneer_digests.errors import MAX_MESSAGE_CHARS
from veneer_digests.jcs import MAX_DEPTH, MAX_NUMBER

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_NUMBER, MAX_NUMBER) | st.floats(-MAX_NUMBER, MAX_NUMBER) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_round_trip(value: object) -> None:
    encoded = canonical_json(value)
    parsed = parse_json(encoded)
    assert parsed == value
    assert canonical_json(parsed) == encoded


@given(st.dictionaries(st.text(), st.integers(0, 9), min_size=2), st.randoms())
def test_order_of_keys_is_no_part_and_theirs_is_by_utf16(members: dict[str, int], random: Random) -> None:
    items = list(members.items())
    random.shuffle(items)
    encoded = canonical_json(dict(items))
    assert encoded == canonical_json(members)
    keys = list(json.loads(encoded))
    assert keys == sorted(members, key=lambda key: key.encode("utf-16-be"))


def test_strings_are_not_normalised() -> None:
    assert canonical_json("caf\u00e9") == b'"caf\xc3\xa9"'
    assert canonical_json("cafe\u0301") == b'"cafe\xcc\x81"'


def test_numbers_have_one_form() -> None:
    assert canonical_json([1, 1.0, -0.0, 1e-7, 1e15]) == b"[1,1,0,1e-7,1000000000000000]"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"a": [math.nan]}, r"\$\.a\[0\] must be finite"),
        (math.inf, "must be finite"),
        (MAX_NUMBER + 1, "got 9007199254740992"),
        (-MAX_NUMBER - 1, "within"),
        (float(MAX_NUMBER + 1), "within"),
        ([10**5000], "an integer of 16610 bits"),
        ("\ud800", "lone surrogate at character 0"),
        ({"\udc00": 1}, "a key in .* lone surrogate"),
        ({1: 2}, "a key in .* must be a string, got 1"),
        ((1, 2), "type that JSON has not: tuple"),
        (b"bytes", "type that JSON has not: bytes"),
    ],
)
def test_refuses_with_the_place_and_the_value(value: object, problem: str) -> None:
    with pytest.raises(NotCanonicalError, match=problem):
        canonical_json(value)


def test_nesting_is_bounded() -> None:
    value: Any = "core"
    for _ in range(MAX_DEPTH):
        value = {"k": value}
    canonical_json(value)
    with pytest.raises(NotCanonicalError, match="deeper than 64"):
        canonical_json([value])
    for _ in range(100_000):
        value = [value]
    with pytest.raises(NotCanonicalError, match="deeper than 64"):
        canonical_json(value)
    while isinstance(value, list):  # or its own disposal would recurse as deep
        value = value[0]


def test_a_message_is_short_and_in_ascii() -> None:
    with pytest.raises(NotCanonicalError) as caught:
        canonical_json({"图" * 10_000: {"y" * 10_000: math.nan}})
    message = str(caught.value)
    assert message.isascii()
    assert len(message) <= MAX_MESSAGE_CHARS
    assert message.startswith("$.")
    assert message.endswith("got nan")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a":1,"b":{"x":1,"x":1}}', "key 'x' is there twice"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"\xff", "not JSON in UTF-8"),
        ('"é"'.encode("utf-16"), "not JSON in UTF-8"),
        (b'\xef\xbb\xbf"bom"', "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON in UTF-8"),
        (b"1" * 5_000, "not JSON in UTF-8"),
        (b'{"a":1', "not JSON in UTF-8"),
        (b"", "not JSON in UTF-8"),
    ],
)
def test_the_parser_refuses(text: bytes, problem: str) -> None:
    with pytest.raises(DigestError, match=problem):
        parse_json(text)
