"""Conversations as the domain holds them: roles, texts and pictures, checked when they are made.

Owns what is true of a conversation for every model. What a given tokenizer forbids in a text (its control
tokens) is checked in `processor`; how bytes become a `Picture` is in `pictures`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from veneer_processing.errors import ConversationError, PictureError

Role = Literal["system", "user", "assistant"]

_ROLES = frozenset(get_args(Role))
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text, taken as it is.

    Raises:
        ConversationError: it holds a lone surrogate, which no UTF-8 text can.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise ConversationError(
                f"a text holds the lone surrogate {self.text[error.start]!a} at character {error.start}"
            ) from error


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture: its identity, its size and, where pixels are asked for, its pixels.

    Tokens are counted from the size alone. `rgb` is either the whole upright picture, or, with `is_resized`,
    what the contract's one resize made of it; then width and height are those of the resized picture. Two
    pictures are equal when digest, size and form are: pixels follow from them.

    Attributes:
        sha256: of the file's bytes, 64 lower-case hexadecimal digits.
        width: in pixels, after the EXIF orientation was applied.
        height: likewise.
        rgb: (height, width, 3) uint8, or None where only tokens are counted.
        is_resized: whether `rgb` is already of the contract's size.

    Raises:
        PictureError: no such digest, an edge under 1 pixel, or pixels of another shape.
    """

    sha256: str
    width: int
    height: int
    rgb: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    is_resized: bool = False

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise PictureError(f"a picture's sha256 is 64 lower-case hexadecimal digits, got {self.sha256[:80]!r}")
        if self.width < 1 or self.height < 1:
            raise PictureError(f"a picture has at least 1x1 pixels, got {self.width}x{self.height}")
        if self.rgb is not None and (self.rgb.shape != (self.height, self.width, 3) or self.rgb.dtype != np.uint8):
            raise PictureError(
                f"pixels must be uint8 of shape ({self.height}, {self.width}, 3), "
                f"got {self.rgb.dtype} of shape {self.rgb.shape}"
            )

    @classmethod
    def resized(cls, sha256: str, rgb: NDArray[np.uint8]) -> "Picture":
        """A picture whose pixels went through the contract's resize already.

        Args:
            sha256: digest of the file it was made from.
            rgb: (height, width, 3) uint8.

        Raises:
            PictureError: as the class.
        """
        if rgb.ndim != 3:
            raise PictureError(f"pixels must have shape (height, width, 3), got {rgb.shape}")
        return cls(sha256, rgb.shape[1], rgb.shape[0], rgb, is_resized=True)


Part = Text | Picture


@dataclass(frozen=True, slots=True)
class Message:
    """One message. An assistant's is an answer to learn unless `supervised` is False.

    Raises:
        ConversationError: an unknown role, no part, or a picture outside a user's message.
    """

    role: Role
    parts: tuple[Part, ...]
    supervised: bool = True

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise ConversationError(f"a role is one of {', '.join(get_args(Role))}, got {str(self.role)[:80]!r}")
        if not self.parts:
            raise ConversationError(f"a message of role {self.role} has no part")
        if self.role != "user":
            for part in self.parts:
                if isinstance(part, Picture):
                    raise ConversationError(
                        f"only a user's message holds pictures, got one in a message of role {self.role}"
                    )

    @property
    def text(self) -> str:
        """All its text in one."""
        if len(self.parts) == 1 and isinstance(only := self.parts[0], Text):
            return only.text
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order: a system message or none, then a user's, then user's and assistant's.

    Raises:
        ConversationError: it does not begin that way, or has a system message further on.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        roles = [message.role for message in self.messages]
        if roles[:1] == ["system"]:
            roles = roles[1:]
        if roles[:1] != ["user"]:
            raise ConversationError(
                "a conversation begins with a user's message, after a system message or none; "
                f"got {roles[0] if roles else 'no further message'}"
            )
        if "system" in roles:
            raise ConversationError(
                f"messages[{len(self.messages) - len(roles) + roles.index('system')}]: "
                "a system message stands first or nowhere"
            )

    @property
    def pictures(self) -> Iterator[Picture]:
        """Its pictures in the order in which the model sees them."""
        return (part for message in self.messages for part in message.parts if isinstance(part, Picture))
