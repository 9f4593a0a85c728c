"""Canonical JSON: RFC 8785, narrowed so that every language gives the same bytes or refuses.

Owns the limits on values, and the parser that refuses what a parsed value no longer shows. How a number or a
string is written is RFC 8785's matter.
"""

import json
from typing import Any, NoReturn

import rfc8785

from veneer_digests.errors import NotCanonicalError, shown
from veneer_digests.preimage import utf8

MAX_DEPTH = 64
"""Most arrays and objects that may lie inside one another."""

MAX_NUMBER = 2**53 - 1
"""Largest magnitude of a number: beyond it, a language whose numbers are doubles reads another one."""


def canonical_json(value: object) -> bytes:
    """The RFC 8785 form of a JSON value: None, bool, int, float, str, list, and dict with str keys.

    Raises:
        NotCanonicalError: a number that is not finite or beyond `MAX_NUMBER`, a lone surrogate, nesting
            deeper than `MAX_DEPTH`, or a value of another type (a tuple too: JSON has one kind of array).
    """
    _check(value, "$", 0)
    return rfc8785.dumps(value)  # type: ignore[arg-type]  # _check has just shown that it is a JSON value


def parse_json(data: bytes) -> Any:  # noqa: ANN401  # what JSON holds is the caller's to check
    """Parse JSON strictly: UTF-8 without a BOM, no key twice in an object, no NaN or Infinity.

    Raises:
        NotCanonicalError: anything else, and nesting or digits beyond what the parser takes.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except NotCanonicalError:
        raise
    except (ValueError, RecursionError) as error:
        raise NotCanonicalError(f"not JSON in UTF-8: {error}") from error


def _check(value: object, place: str, depth: int) -> None:
    if value is None:
        return
    if isinstance(value, str):
        utf8(value, place)
    elif isinstance(value, int | float):  # a bool is an int
        if not -MAX_NUMBER <= value <= MAX_NUMBER:  # a NaN compares false
            raise NotCanonicalError(f"{place} must be finite and within +-(2^53-1), got {shown(value)}")
    elif not isinstance(value, list | dict):
        raise NotCanonicalError(f"{place} is of a type that JSON has not: {shown(value)}")
    elif depth == MAX_DEPTH:
        raise NotCanonicalError(f"{place} lies deeper than {MAX_DEPTH} arrays and objects")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{place}[{index}]", depth + 1)
    else:
        for key, item in value.items():
            utf8(key, f"a key in {place}")
            _check(item, f"{place}.{key}", depth + 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise NotCanonicalError(f"key {shown(key)} is there twice")
        members[key] = value
    return members


def _refuse_constant(constant: str) -> NoReturn:
    raise NotCanonicalError(f"{constant} is no number of JSON's")
