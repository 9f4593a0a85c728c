"""The bytes that each token stands for.

Owns the table alone; a tokenizer's `decode` gives text, and loses the bytes of a character that spans tokens.
"""

import json
from pathlib import Path

from veneer_processing.errors import ModelDirectoryError
from veneer_processing.model_directory import TOKENIZER_FILE, read_bytes


class TokenBytes:
    """The vocabulary of a byte-level BPE tokenizer, as bytes by token id."""

    def __init__(self, directory: Path) -> None:
        """Reads the directory's tokenizer.json.

        Raises:
            ModelDirectoryError: it cannot be read, or is not byte-level.
        """
        try:
            document = json.loads(read_bytes(directory, TOKENIZER_FILE))
            vocabulary: dict[str, int] = document["model"]["vocab"]
            added: dict[int, bytes] = {
                entry["id"]: str(entry["content"]).encode() for entry in document.get("added_tokens", ())
            }
            kind = document["decoder"]["type"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelDirectoryError(f"{TOKENIZER_FILE}: not a tokenizer: {type(error).__name__} {error}") from error
        if kind != "ByteLevel":
            raise ModelDirectoryError(f"{TOKENIZER_FILE}: decoder must be ByteLevel, is {str(kind)[:80]!r}")
        byte_of = _byte_by_character()
        table: dict[int, bytes] = {number: _bytes(token, byte_of) for token, number in vocabulary.items()}
        self._table: dict[int, bytes] = table | added

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of a token; none for an id that the vocabulary leaves free."""
        return self._table.get(token_id, b"")


def _bytes(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes(map(byte_of.__getitem__, token))
    except KeyError:  # a word that was put in as it is
        return token.encode()


def _byte_by_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: its own character, or one from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
