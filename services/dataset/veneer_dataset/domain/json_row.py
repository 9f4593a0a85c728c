"""One line of JSON, read strictly: what a lenient parser would mend or lose is refused with its reason.

The fast path is msgspec's. It takes the last of two equal keys without a word, so keys are counted, in the
line and in the value; only where the counts differ does a slower parser look.
"""

import json
import re
from typing import Any, NoReturn

import msgspec

from veneer_dataset.domain.findings import Refusal

MAX_DEPTH = 64

_decode = msgspec.json.Decoder().decode
_KEY_END = re.compile(rb'"\s*:')  # each key ends so; a text may hold it too, and a colon alone much sooner
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_row(line: bytes) -> dict[str, Any]:
    """The object that a line holds.

    Raises:
        Refusal: the line is no object in strict JSON and UTF-8.
    """
    try:
        value = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _reason(line) from None
    except RecursionError:
        raise Refusal("JSON_TOO_DEEP", "$", "thousands of levels") from None
    if type(value) is not dict:
        raise Refusal("JSON_NOT_OBJECT", "$", value)
    keys = _keys(value, 1)
    if keys != line.count(b":") and keys != len(_KEY_END.findall(line)):
        json.loads(line, object_pairs_hook=_object_once)
    return value


def _keys(value: dict[str, Any] | list[Any], depth: int) -> int:
    """How many keys a value has, at all levels."""
    if depth > MAX_DEPTH:
        raise Refusal("JSON_TOO_DEEP", "$", f"more than {MAX_DEPTH} levels")
    if type(value) is dict:
        count, members = len(value), value.values()
    else:
        count, members = 0, value  # type: ignore[assignment]  # a list of anything
    for member in members:
        kind = type(member)
        if kind is not str and (kind is dict or kind is list):
            count += _keys(member, depth + 1)
    return count


def _object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise Refusal("JSON_KEY_TWICE", "$", key)
        members[key] = value
    return members


def _reason(line: bytes) -> Refusal:
    """Why msgspec refused a line."""
    if line.startswith(b"\xef\xbb\xbf"):
        return Refusal("BYTE_ORDER_MARK", "$", "U+FEFF before the row")
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line[:4]:
        return Refusal("ENCODING_NOT_UTF8", "$", "UTF-16")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return Refusal("ENCODING_NOT_UTF8", "$", f"byte 0x{line[error.start]:02x} at byte {error.start + 1}")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except Refusal as refusal:
        return refusal
    except RecursionError:
        return Refusal("JSON_TOO_DEEP", "$", "thousands of levels")
    except json.JSONDecodeError as error:
        return Refusal("JSON_INVALID", "$", f"{error.msg} at character {error.pos + 1}")
    except ValueError:  # more digits than Python turns into an integer
        return Refusal("JSON_NUMBER", "$", "an integer of thousands of digits")
    surrogate = _SURROGATE.search(json.dumps(value, ensure_ascii=False))
    if surrogate:
        return Refusal("TEXT_LONE_SURROGATE", "$", ascii(surrogate[0]))
    return Refusal("JSON_NUMBER", "$", "a number out of range")


def _refuse_constant(constant: str) -> NoReturn:
    raise Refusal("JSON_NUMBER", "$", constant)
