"""What this package raises, and how a value is quoted in its messages.

A message names the place, the limit and the actual value, and no path of the machine.
"""

MAX_MESSAGE_CHARS = 512
SHOWN_CHARS = 80


class DigestError(ValueError):
    """Base of all: an input that has no digest under the rules of protos/DIGESTS.md.

    The message is ASCII, `MAX_MESSAGE_CHARS` at most: of a longer one the middle goes.
    """

    def __init__(self, message: str) -> None:
        message = message.encode("ascii", "backslashreplace").decode("ascii")
        if len(message) > MAX_MESSAGE_CHARS:
            half = MAX_MESSAGE_CHARS // 2 - 2
            message = f"{message[:half]}...{message[-half:]}"
        super().__init__(message)


class NotCanonicalError(DigestError):
    """A text, JSON value, row or config that does not have the one form the rules allow."""


class SafetensorsError(DigestError):
    """A file that is not a well-formed safetensors file, or a set of them that does not fit together."""


def shown(value: object) -> str:
    """A value as a message quotes it, at most `SHOWN_CHARS` characters; of what is no scalar, its type."""
    if isinstance(value, str):
        text = ascii(value[:SHOWN_CHARS])
    elif isinstance(value, int) and value.bit_length() > 256:
        text = f"an integer of {value.bit_length()} bits"
    elif value is None or isinstance(value, int | float):
        text = repr(value)
    else:
        text = type(value).__name__
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
