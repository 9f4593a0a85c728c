"""A row on its way from a dialect to its canonical form, and the checks that every dialect shares.

A draft's messages have the canonical form of `veneer_digests.row`, but for the digests of its pictures:
whoever resolves them fills them in.
"""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from veneer_dataset.domain.findings import Refusal
from veneer_rpc.errors import ResourceExhausted

MAX_TEXT_BYTES = 1024 * 1024
MAX_PARTS = 256
MAX_MESSAGES = 10_000

_SURELY_SMALL_CHARS = MAX_TEXT_BYTES // 4
_CONTROL = re.compile(
    r"<\|(?:im_start|im_end|endoftext|object_ref_(?:start|end)|box_(?:start|end)|quad_(?:start|end)|"
    r"vision_(?:start|end|pad)|image_pad|video_pad|fim_(?:prefix|middle|suffix|pad)|repo_name|file_sep)\|>"
)
_SPLIT = re.compile(r"[a-z0-9_-]{1,32}")
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

Part = dict[str, str]
Message = dict[str, Any]


class PictureUse(msgspec.Struct):
    """A picture in a draft: the canonical part that waits for its digest, and a path or a file's bytes."""

    part: Part
    source: str | bytes
    json_path: str


class Draft(msgspec.Struct):
    """A row as a dialect's reader leaves it."""

    messages: list[Message] = []
    pictures: list[PictureUse] = []
    split: str = ""
    group: str = ""

    def picture(self, reference: object, json_path: str) -> Part:
        """Takes a picture in: a path, a data URL, or an object that holds one under `path` or `url`."""
        if isinstance(reference, dict):
            key = "url" if "url" in reference else "path"
            reference, json_path = reference.get(key), f"{json_path}.{key}"
        if type(reference) is not str:
            raise Refusal("FIELD_TYPE", json_path, reference)
        source: str | bytes = reference
        if reference.startswith(("data:", "DATA:")):
            source = _data_url(reference, json_path)
        elif _URL.match(reference):
            raise Refusal("PICTURE_URL", json_path, reference)
        part = {"type": "image", "digest": ""}
        self.pictures.append(PictureUse(part, source, json_path))
        return part

    def say(self, role: str, parts: list[Part], json_path: str) -> Message:
        """Adds a message whose role is a canonical one; the parts are then the message's."""
        if not parts:
            raise Refusal("ANSWER_MISSING" if role == "assistant" else "FIELD_MISSING", json_path, "")
        if len(parts) > MAX_PARTS:
            raise Refusal("PARTS_TOO_MANY", json_path, len(parts))
        if role != "user":
            for part in parts:
                if part["type"] == "image":
                    raise Refusal("PICTURE_PLACE", json_path, f"a picture in a message of the {role}")
        messages = self.messages
        if len(messages) == MAX_MESSAGES:
            raise ResourceExhausted("TOO_MANY_MESSAGES", f"a row has more than {MAX_MESSAGES} messages, the limit")
        message: Message = {"role": role, "content": merged(parts) if len(parts) > 1 else parts}
        messages.append(message)
        return message

    def check(self) -> None:
        """Checks what concerns the messages as a whole: their order, and that there is an answer to learn."""
        roles = [message["role"] for message in self.messages]
        first = 1 if roles[:1] == ["system"] else 0
        if roles[first : first + 1] != ["user"]:
            raise Refusal("ROLE_ORDER", "$", f"begins with {roles[first] if roles[first:] else 'nothing'}")
        if "system" in roles[1:]:
            raise Refusal("ROLE_ORDER", "$", f"message {roles.index('system', 1) + 1} is a system message")
        if roles[-1] != "assistant":
            raise Refusal("ANSWER_MISSING", "$", f"ends with a message of the {roles[-1]}")
        if all("weight" in message for message in self.messages if message["role"] == "assistant"):
            raise Refusal("ANSWER_MISSING", "$", "every answer has weight 0")


def merged(parts: Sequence[Part]) -> list[Part]:
    """Parts with neighbouring texts made one."""
    whole: list[Part] = []
    for part in parts:
        if whole and part["type"] == "text" == whole[-1]["type"]:
            whole[-1] = text_part(whole[-1]["text"] + part["text"])
        else:
            whole.append(part)
    return whole


def text_part(text: str) -> Part:
    """A canonical part that holds a text."""
    return {"type": "text", "text": text}


def text_of(value: object, json_path: str) -> str:
    """A text that a row may hold, taken as it is.

    Raises:
        Refusal: no text, too large, or one with characters or tokens that a model must not be given.
    """
    if type(value) is not str:
        raise Refusal("FIELD_TYPE", json_path, value)
    if len(value) > _SURELY_SMALL_CHARS and len(value.encode()) > MAX_TEXT_BYTES:
        raise Refusal("TEXT_TOO_LARGE", json_path, f"{len(value)} characters")
    if "\0" in value:
        raise Refusal("TEXT_NUL", json_path, f"U+0000 at character {value.index(chr(0)) + 1}")
    if "<|" in value and (token := _CONTROL.search(value)):
        raise Refusal("TEXT_CONTROL_TOKEN", json_path, token[0])
    return value


def list_of(value: object, json_path: str) -> list[Any]:
    """A list.

    Raises:
        Refusal: it is none.
    """
    if type(value) is not list:
        raise Refusal("FIELD_TYPE", json_path, value)
    return value


def object_of(value: object, json_path: str) -> dict[str, Any]:
    """An object.

    Raises:
        Refusal: it is none.
    """
    if type(value) is not dict:
        raise Refusal("FIELD_TYPE", json_path, value)
    return value


def split_name(value: object, json_path: str) -> str:
    """The name of a split.

    Raises:
        Refusal: it cannot be one.
    """
    if type(value) is not str or not _SPLIT.fullmatch(value):
        raise Refusal("SPLIT_INVALID", json_path, value)
    return value


def _data_url(text: str, json_path: str) -> bytes:
    head = _DATA_URL.match(text)
    if head is None:
        raise Refusal("PICTURE_DATA_URL", json_path, text[:60])
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal("PICTURE_DATA_URL", json_path, error) from None
