"""Conversations as people write them: texts and pictures, turned into the contract's messages."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from veneer.dataset.v1.conversation_pb2 import Message, Part, Picture, Role
from veneer_client._errors import VeneerError

Image: TypeAlias = str | os.PathLike[str] | bytes
"""A picture's file, by path or as its bytes."""

Question: TypeAlias = str | Sequence[Message]
"""A text, or a whole conversation."""

ROLES = {"system": Role.ROLE_SYSTEM, "user": Role.ROLE_USER, "assistant": Role.ROLE_ASSISTANT}


class ImageError(VeneerError):
    """A picture that cannot be read; the text names it."""


def message(role: str, *parts: str | Path | bytes) -> Message:
    """Returns a message of `system`, `user` or `assistant`; a `str` is text, a path or bytes a picture."""
    return Message(role=ROLES[role], parts=[_part(part) for part in parts])


def conversation(question: Question, images: Sequence[Image]) -> list[Message]:
    """Returns a user's message with the pictures before the text; a conversation stays as it is."""
    if isinstance(question, str):
        pictures = [image if isinstance(image, bytes) else Path(image) for image in images]
        return [message("user", *pictures, *([question] if question else []))]
    if images:
        raise ValueError("a conversation holds its own pictures: leave `image` and `images` out")
    return list(question)


def pictures_of(messages: Sequence[Message]) -> list[Picture]:
    """Returns the pictures of a conversation, in order."""
    return [part.picture for each in messages for part in each.parts if part.HasField("picture")]


def _part(part: str | Path | bytes) -> Part:
    if isinstance(part, str):
        return Part(text=part)
    return Part(picture=Picture(data=part if isinstance(part, bytes) else _read(part)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"the picture {path} cannot be read: {error.strerror}") from error
