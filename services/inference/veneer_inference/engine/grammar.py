"""Answers held to a JSON schema: which tokens may come next.

Owns the use of llguidance (https://github.com/guidance-ai/llguidance); nothing else imports it. Without torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from veneer_inference.ports import EngineError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

TOKENIZER_FILE = "tokenizer.json"
_KEPT = 64  # compiled schemas
# White space as people and programs write JSON: without a bound a model may go on with spaces for ever.
_STYLE: JsonCompileOptions = {"whitespace_pattern": "[ \\n]{0,16}", "lenient": False}


class Grammar:
    """One answer's way through its schema.

    Args:
        matcher: at its beginning; nobody else's.
        vocabulary: ids there are.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> NDArray[np.bool_]:
        """Which ids (V,) may come next.

        Raises:
            EngineError: `SCHEMA_UNSUPPORTED`: following the schema exceeds llguidance's limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(np.bool_)

    def take(self, token: int) -> None:
        """The next token has been chosen.

        Raises:
            EngineError: `SCHEMA_UNSUPPORTED`, as in `allowed`, or the token was not allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """The answer is of the schema, and nothing may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError("SCHEMA_UNSUPPORTED", [self._matcher.get_error()])


class Grammars:
    """Schemas of a base, compiled once each. May be used by several threads.

    Args:
        directory: of the base, with its tokenizer.
        vocabulary: ids that the model has.
    """

    def __init__(self, directory: Path, vocabulary: int) -> None:
        self._file = directory / TOKENIZER_FILE
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}
        self._matchers: OrderedDict[tuple[str, tuple[int, ...]], LLMatcher] = OrderedDict()

    def grammar(self, schema: str, stop_ids: tuple[int, ...]) -> Grammar:
        """The grammar of a JSON schema, at its beginning.

        Args:
            schema: JSON text.
            stop_ids: any of which ends an answer that is complete.

        Raises:
            EngineError: `SCHEMA_UNSUPPORTED`: it is no schema, or not one that llguidance can hold an answer to.
        """
        key = schema, stop_ids
        with self._lock:
            matcher = self._matchers.get(key)
            if matcher is None:
                matcher = self._matchers[key] = self._compiled(schema, stop_ids)
                if len(self._matchers) > _KEPT:
                    self._matchers.popitem(last=False)
            self._matchers.move_to_end(key)
            return Grammar(matcher.deep_copy(), self._vocabulary)

    def _compiled(self, schema: str, stop_ids: tuple[int, ...]) -> LLMatcher:
        tokenizer = self._tokenizer(stop_ids)
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_STYLE)
        except ValueError as error:
            raise EngineError("SCHEMA_UNSUPPORTED", [f"it is no JSON object: {error}"]) from error
        limits = LLParserLimits(verbose_errors=False)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer, limits=limits)
        if failed or messages:  # a warning says that a part of the schema would not be held to
            raise EngineError("SCHEMA_UNSUPPORTED", messages)
        return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)

    def _tokenizer(self, stop_ids: tuple[int, ...]) -> LLTokenizer:
        if stop_ids not in self._tokenizers:
            if not stop_ids:
                raise EngineError("SCHEMA_UNSUPPORTED", ["no token ends an answer"])
            try:
                text = self._file.read_text("utf-8")
                self._tokenizers[stop_ids] = LLTokenizer(text, self._vocabulary, list(stop_ids))
            except (OSError, ValueError, RuntimeError) as error:
                raise EngineError("SCHEMA_UNSUPPORTED", [f"{self._file.name} cannot be used: {error}"]) from error
        return self._tokenizers[stop_ids]
