"""Pages of a list: opaque tokens that hold a cursor and belong to one query of one tenant.

A cursor is the sort key of the last item given out, not an offset: rows inserted or deleted between two
pages neither repeat nor hide another row. A token is authenticated (HMAC-SHA256 over query and cursor), so
one of another query, another tenant or another deployment, or one made up, is refused. The page size may
change between pages (AIP-158, https://google.aip.dev/158).
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Generic, TypeVar

from veneer_rpc.errors import Violation, invalid

_T = TypeVar("_T")
Cursor = tuple[str | int, ...]

_MAC_BYTES = 16
_MAX_TOKEN_CHARS = 4096
_MIN_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Query:
    """What a list was asked for; a token is good only for an equal one."""

    method: str
    tenant: str
    parent: str = ""
    filter: str = ""
    order_by: str = ""


@dataclass(frozen=True, slots=True)
class Page(Generic[_T]):
    """Some items, and the token of the next page; empty after the last."""

    items: Sequence[_T]
    next_page_token: str


class Paginator:
    """Gives out lists page by page.

    Args:
        key: secret of the deployment, the same in each replica; 32 bytes or more.
        default_size: items of a page when the caller names no size.
        max_size: most items of a page; a caller who asks for more gets this many.

    Raises:
        ValueError: the key is too short.
    """

    def __init__(self, key: bytes, default_size: int = 50, max_size: int = 1000) -> None:
        if len(key) < _MIN_KEY_BYTES:
            raise ValueError(f"the key must have {_MIN_KEY_BYTES} bytes or more, has {len(key)}")
        self._key = key
        self._default_size = default_size
        self._max_size = max_size

    def page(
        self,
        query: Query,
        page_size: int,
        page_token: str,
        fetch: Callable[[Cursor | None, int], Sequence[_T]],
        cursor_of: Callable[[_T], Cursor],
    ) -> Page[_T]:
        """Returns one page.

        Args:
            query: what is listed.
            page_size: as asked; 0 for the default.
            page_token: as sent; empty for the first page.
            fetch: returns up to so many items, in order, of which each has a cursor greater than the given
                one.
            cursor_of: an item's place in that order; unique, or items with equal places may be lost.

        Raises:
            InvalidArgument: the size is negative, or the token is not from this query.
        """
        if page_size < 0:
            raise invalid(Violation("page_size", "OUT_OF_RANGE", f"must be 0 or more, was {page_size}"))
        size = min(page_size or self._default_size, self._max_size)
        after = self._read(query, page_token) if page_token else None
        items = fetch(after, size + 1)  # one more tells whether there is a next page
        if len(items) <= size:
            return Page(items, "")
        return Page(items[:size], self._token(query, cursor_of(items[size - 1])))

    def _token(self, query: Query, cursor: Cursor) -> str:
        raw = json.dumps(cursor, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._mac(query, raw) + raw).rstrip(b"=").decode()

    def _read(self, query: Query, token: str) -> Cursor:
        refused = invalid(
            Violation("page_token", "PAGE_TOKEN_INVALID", "must be the next_page_token of the same query")
        )
        if len(token) > _MAX_TOKEN_CHARS:
            raise refused
        try:
            padded = (token + "=" * (-len(token) % 4)).encode("ascii")
            sealed = base64.b64decode(padded, altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError) as error:
            raise refused from error
        mac, raw = sealed[:_MAC_BYTES], sealed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(query, raw)):
            raise refused
        return tuple(json.loads(raw))

    def _mac(self, query: Query, cursor: bytes) -> bytes:
        # JSON keeps the parts apart: no filter can pass for another filter and order.
        bound = json.dumps([*astuple(query), cursor.decode("latin-1")]).encode()
        return hmac.digest(self._key, bound, hashlib.sha256)[:_MAC_BYTES]
