import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from veneer_digests import NotCanonicalError, canonical_row, row_digest

HEX = "ab" * 32
TEXTS = st.text(min_size=1).map(lambda text: {"type": "text", "text": text})
IMAGES = st.binary(min_size=32, max_size=32).map(lambda digest: {"type": "image", "digest": digest.hex()})


def _merge(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep of several texts in a row the first."""
    return [part for at, part in enumerate(parts) if not (at and part["type"] == parts[at - 1]["type"] == "text")]


CONTENTS = st.lists(TEXTS | IMAGES, max_size=4).map(_merge)
MESSAGES = st.builds(
    lambda role, content, weight: {"role": role, "content": content} | (weight if role == "assistant" else {}),
    st.sampled_from(["system", "user", "assistant"]),
    CONTENTS,
    st.sampled_from([{}, {"weight": 0}]),
)
ROWS = st.lists(MESSAGES, min_size=1, max_size=4).map(lambda messages: {"messages": messages})


def example() -> dict[str, Any]:
    return {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "digest": HEX}, {"type": "text", "text": "What?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A barn."}], "weight": 0},
            {"role": "assistant", "content": [{"type": "text", "text": "A red barn."}]},
        ]
    }


@given(ROWS)
def test_is_rfc_8785_and_its_sha256(row: dict[str, Any]) -> None:
    encoded = canonical_row(row)
    assert encoded == rfc8785.dumps(row)
    assert json.loads(encoded) == row
    assert row_digest(row) == hashlib.sha256(encoded).hexdigest()


@given(ROWS, ROWS)
def test_rows_share_a_digest_only_when_they_are_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (row_digest(one) == row_digest(other)) == (one == other)


def _set(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(row: dict[str, Any]) -> None:
        at: Any = row
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("messages", 0, "role", to="system"),
        _set("messages", 0, "content", 0, "digest", to="ac" * 32),
        _set("messages", 0, "content", 1, "text", to="What"),
        _set("messages", 0, "content", 1, to={"type": "image", "digest": HEX}),
        lambda row: row["messages"][0]["content"].reverse(),
        lambda row: row["messages"][0]["content"].pop(),
        lambda row: row["messages"][1].pop("weight"),
        lambda row: row["messages"].reverse(),
        lambda row: row["messages"].pop(),
        lambda row: row["messages"].append(row["messages"][0]),
    ],
)
def test_a_change_of_any_member_changes_the_digest(change: Callable[[dict[str, Any]], None]) -> None:
    row = copy.deepcopy(example())
    change(row)
    assert row_digest(row) != row_digest(example())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set("messages", to=[]), r"\$\.messages must be a list with a message"),
        (_set("messages", to={"0": "hello"}), r"\$\.messages must be a list with a message in it, got dict"),
        (_set("id", to=7), r"\$ must have just the keys messages; it has 'messages', 'id'"),
        (_set("messages", 0, to="hello"), r"\$\.messages\[0\] must be an object, got 'hello'"),
        (_set("messages", 0, "role", to="User"), r"\$\.messages\[0\]\.role must be one of system, user"),
        (_set("messages", 0, "role", to=["user"]), r"\.role must be one of"),
        (
            _set("messages", 0, "weight", to=0),
            r"\.weight is for an assistant's message, this one is the user's",
        ),
        (_set("messages", 1, "weight", to=1), r"\.weight is 0 or not there, got 1"),
        (_set("messages", 1, "weight", to=0.0), r"\.weight is 0 or not there, got 0\.0"),
        (_set("messages", 1, "weight", to=False), r"\.weight is 0 or not there, got False"),
        (_set("messages", 1, "name", to="x"), r"\[1\] must have just the keys role, content, weight"),
        (_set("messages", 2, "name", to=0), r"\[2\] must have just the keys role, content; it has"),
        (_set("messages", 0, "content", to="x"), r"\[0\]\.content must be a list of parts, got 'x'"),
        (_set("messages", 0, "content", 1, "text", to=""), r"\.content\[1\]\.text is empty"),
        (_set("messages", 0, "content", 1, "text", to=7), r"\.content\[1\]\.text must be a string, got 7"),
        (_set("messages", 0, "content", 1, "text", to="\ud800"), "lone surrogate at character 0"),
        (_set("messages", 0, "content", 1, "type", to="video"), r"of type text or image, got 'video'"),
        (_set("messages", 0, "content", 1, "lang", to="en"), r"\[1\] must have just the keys type, text"),
        (
            _set("messages", 0, "content", 1, to="What?"),
            r"must be a part of type text or image, got 'What\?'",
        ),
        (
            _set("messages", 0, "content", 0, to={"type": "text", "text": "a"}),
            r"\[1\] is a text after a text",
        ),
        (_set("messages", 0, "content", 0, "digest", to=HEX.upper()), r"\[0\]\.digest must be 64 lower-case"),
        (_set("messages", 0, "content", 0, "digest", to=f"sha256:{HEX}"), "64 lower-case hex digits"),
        (_set("messages", 0, "content", 0, "detail", to="high"), "must have just the keys type, digest"),
    ],
)
def test_enforces_the_form_and_names_the_place(change: Callable[[dict[str, Any]], None], problem: str) -> None:
    row = copy.deepcopy(example())
    change(row)
    with pytest.raises(NotCanonicalError, match=problem):
        canonical_row(row)


def test_only_lists_and_objects_are_taken_for_such() -> None:
    for change in (
        lambda row: row.update(messages=tuple(row["messages"])),
        lambda row: row["messages"][0].update(content=tuple(row["messages"][0]["content"])),
        lambda row: row["messages"][2].update(content=[("type", "text")]),
    ):
        row = copy.deepcopy(example())
        change(row)
        with pytest.raises(NotCanonicalError):
            canonical_row(row)


def test_a_row_of_other_dicts_has_the_same_form() -> None:
    class Members(dict[str, Any]):
        pass

    row = Members(example())
    row["messages"][1] = Members(row["messages"][1])
    row["messages"][1]["content"] = [Members(type="text", text="A barn.")]
    assert canonical_row(row) == canonical_row(example())


def test_a_row_is_not_repaired_nor_touched() -> None:
    row = example()
    canonical_row(row)
    assert row == example()
