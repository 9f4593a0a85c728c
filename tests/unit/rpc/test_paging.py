"""Pages: each item once, whatever happens in between, and tokens that fit one query only."""

import base64
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_rpc.errors import InvalidArgument
from veneer_rpc.paging import Cursor, Page, Paginator, Query

KEY = bytes(range(32))
QUERY = Query("ListDatasets", "acme", filter='name = "x"', order_by="id")
Row = tuple[str, int]


def page(rows: list[Row], size: int, token: str, query: Query = QUERY, key: bytes = KEY) -> Page[Row]:
    def fetch(after: Cursor | None, limit: int) -> list[Row]:
        return [row for row in sorted(rows) if after is None or row > after][:limit]

    return Paginator(key, default_size=3, max_size=5).page(query, size, token, fetch, lambda row: row)


rows_of_list = st.lists(st.tuples(st.text(max_size=4), st.integers(-9, 2**70)), unique=True, max_size=30)


@given(rows=rows_of_list, changes=st.data(), sizes=st.lists(st.integers(0, 9), min_size=1))
def test_each_item_comes_once_though_rows_come_and_go(
    rows: list[Row], changes: st.DataObject, sizes: list[int]
) -> None:
    steady, seen, token, turn = set(rows), list[Row](), "", 0
    while True:
        got = page(rows, sizes[turn % len(sizes)], token)
        seen += got.items
        turn += 1
        if not got.next_page_token:
            break
        token = got.next_page_token
        if turn < 10:
            rows = [*rows, *(row for row in changes.draw(rows_of_list) if row not in rows)]
        if rows and changes.draw(st.booleans()):
            gone = changes.draw(st.sampled_from(rows))
            rows = [row for row in rows if row != gone]
            steady.discard(gone)
    assert len(seen) == len(set(seen))
    assert steady <= set(seen)


def test_the_size_has_a_default_and_a_cap() -> None:
    rows = [("a", index) for index in range(10)]
    assert len(page(rows, 0, "").items) == 3
    assert len(page(rows, 99, "").items) == 5
    with pytest.raises(InvalidArgument, match="page_size"):
        page(rows, -1, "")


def test_a_full_last_page_has_no_next() -> None:
    assert page([("a", 1), ("a", 2)], 2, "").next_page_token == ""
    assert page([], 2, "") == Page([], "")


@pytest.mark.parametrize(
    "query",
    [
        replace(QUERY, method="ListModels"),
        replace(QUERY, tenant="globex"),
        replace(QUERY, parent="datasets/x"),
        replace(QUERY, filter=""),
        replace(QUERY, order_by=""),
        replace(QUERY, filter='name = "x"id', order_by=""),
    ],
)
def test_a_token_fits_its_own_query_only(query: Query) -> None:
    rows = [("a", index) for index in range(10)]
    token = page(rows, 2, "").next_page_token
    assert page(rows, 2, token).items == [("a", 2), ("a", 3)]
    with pytest.raises(InvalidArgument, match="page_token"):
        page(rows, 2, token, query)


def test_a_token_of_another_deployment_is_refused() -> None:
    token = page([("a", 1), ("a", 2)], 1, "").next_page_token
    with pytest.raises(InvalidArgument):
        page([], 1, token, key=bytes(32))


@given(st.text(max_size=200) | st.binary(max_size=100).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
def test_a_forged_token_is_refused(token: str) -> None:
    if token:
        with pytest.raises(InvalidArgument):
            page([("a", 1)], 1, token)


@given(st.integers(0, 10**6))
def test_a_token_changed_anywhere_is_refused(place: int) -> None:
    token = page([("a", 1), ("a", 2)], 1, "").next_page_token
    raw = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    raw[place % len(raw)] ^= 1 + place % 255
    with pytest.raises(InvalidArgument):
        page([], 1, base64.urlsafe_b64encode(raw).rstrip(b"=").decode())


def test_a_huge_token_is_refused_unread() -> None:
    with pytest.raises(InvalidArgument):
        page([], 1, "A" * 4_000_000)


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Paginator(b"short")
