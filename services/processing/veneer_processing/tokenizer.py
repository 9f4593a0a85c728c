"""The tokenizer of a model directory, and its control tokens.

Owns ids and text, and nothing of a conversation's form: that is `template`.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import tokenizers

from veneer_processing.errors import ModelDirectoryError
from veneer_processing.model_directory import TOKENIZER_FILE, read_bytes


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the tokens that Qwen's conversations are made of."""

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int


class Tokenizer:
    """A byte-level BPE tokenizer.

    Control tokens are the added tokens that are marked special and those written `<|...|>`. Others
    (`<think>`, `<tool_call>`) are words that a model may be taught to write.

    Attributes:
        digest: SHA-256 of tokenizer.json.
        special: ids of the tokens Qwen's conversations are made of.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the directory's tokenizer.json.

        Raises:
            ModelDirectoryError: it is missing, is none, or lacks a token that conversations need.
        """
        data = read_bytes(directory, TOKENIZER_FILE)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise ModelDirectoryError(f"{TOKENIZER_FILE}: not a tokenizer: {str(error)[:300]}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = _digest(data)
        self.special = SpecialIds(*(self._special_id(f"<|{field.name}|>") for field in fields(SpecialIds)))
        added = self._tokenizer.get_added_tokens_decoder().values()
        control = [each.content for each in added if each.special or re.fullmatch(r"<\|.*\|>", each.content)]
        self._control_start = os.path.commonprefix(control)  # noqa: RUF071  # of texts, not of paths
        self._control = re.compile("|".join(re.escape(each) for each in sorted(control, key=len, reverse=True)))
        self._cuts = all("<" not in each.content[1:] for each in added) and all(map(self._is_cut_at, control))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; control tokens written in it become their ids."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids each text has."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens written out; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def control_token_in(self, text: str) -> str | None:
        """The first control token written in a text."""
        if self._control_start not in text:  # much sooner told than by the expression
            return None
        found = self._control.search(text)
        return found and found[0]

    def apart(self, text: str) -> list[str]:
        """A text cut before and after its control tokens: its ids are those of the pieces, one after another.

        Uncut where a control token is not read for itself alone.
        """
        if not self._cuts:
            return [text]
        pieces, start = [], 0
        for found in self._control.finditer(text):
            pieces += [text[start : found.start()], found[0]]
            start = found.end()
        return [*pieces, text[start:]]

    def as_read(self, text: str) -> str:
        """The text in the form the tokenizer reads (Qwen's: Unicode NFC); ids decode to it exactly."""
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None or text.isascii() else normalizer.normalize_str(text)

    def _is_cut_at(self, token: str) -> bool:
        pieces = ["a", token, "b \n", token, "\n a ", token]
        whole, *apart = self.encode(["".join(pieces), *pieces])
        return whole == list(chain.from_iterable(apart))

    def _special_id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ModelDirectoryError(f"{TOKENIZER_FILE}: added_tokens has no {token}")
        return found


def tokenizer_digest(directory: Path) -> str:
    """The `digest` of a directory's tokenizer, which is not read for that; raises ModelDirectoryError."""
    return _digest(read_bytes(directory, TOKENIZER_FILE))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
