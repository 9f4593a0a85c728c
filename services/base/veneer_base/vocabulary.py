"""The compact vocabulary: which of Qwen's 151,936 token ids the small model has rows for.

Owns the choice of ids and the way between texts and compact ids. The last compact id stands for every other token.
"""

import random
import string
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

from veneer_base import alphabet, documents, pages, tasks
from veneer_base.tokenizer import FIRST_SPECIAL_ID, SPECIAL_TOKENS, tokenizer_json

_NO_INK = np.zeros((0, 0), np.uint8)
_SAMPLED_PAGES = 6_000
_SAMPLED_DOCUMENTS = 600


def qwen_tokenizer() -> Tokenizer:
    """Qwen's tokenizer; about 4 s to build."""
    return Tokenizer.from_str(tokenizer_json())


def choose_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that training texts, answers about documents and single characters need; the same on every call."""
    ids = set(range(FIRST_SPECIAL_ID, FIRST_SPECIAL_ID + len(SPECIAL_TOKENS)))
    for encoding in tokenizer.encode_batch(list(_texts()), add_special_tokens=False):
        ids.update(encoding.ids)
    return sorted(ids)


def _texts() -> Iterator[str]:
    r = random.Random(0)
    for word in (*alphabet.WORDS_ZH, *alphabet.WORDS_EN, *alphabet.KEYS_ZH, *alphabet.SURNAMES):
        yield from (word, f" {word}", word.lower(), f" {word.lower()}", f'"{word}"', word.upper())
    yield from (*string.printable, *alphabet.CHARACTERS, *alphabet.FREQUENT_HANZI, *tasks.PHRASES)
    yield from (f"user\nassistant\nsystem\n{n}" for n in range(10))
    placement = pages.Placement()
    for _ in range(_SAMPLED_PAGES):
        line = pages.line(r, placement.keyed)
        page = pages.Page(_NO_INK, [line, pages.line(r, 1.0)], [])
        for question in (tasks.transcription(r, page), *tasks.questions(r, page, 3)):
            yield from (question.prompt, question.answer)
    for write in documents.WRITERS.values():
        for _ in range(_SAMPLED_DOCUMENTS):
            document = write(r)
            yield from (document.answer("sentence"), document.answer("json"))
    yield from documents.PROMPTS.values()


class CompactVocabulary:
    """Texts as compact ids and back.

    Args:
        tokenizer: Qwen's.
        ids: Qwen's ids in the order of the compact ones.
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = ids
        self._compact = {token_id: i for i, token_id in enumerate(ids)}
        self.unknown = len(ids)
        self.size = len(ids) + 1

    def compact(self, token_id: int) -> int:
        """The compact id of one of Qwen's ids."""
        return self._compact.get(token_id, self.unknown)

    def encode(self, text: str) -> list[int]:
        """A text's compact ids; special tokens in the text are recognised."""
        return [self.compact(i) for i in self._tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, compact_ids: list[int]) -> str:
        """The text of compact ids, special tokens left out."""
        return str(self._tokenizer.decode([self._ids[i] for i in compact_ids if i != self.unknown]))
