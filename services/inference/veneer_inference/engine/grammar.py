"""Answers held to a JSON schema: which tokens may come next.

Owns the use of llguidance (https://github.com/guidance-ai/llguidance), with `schema_check`; nothing else imports it.
Without torch.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from veneer_inference.engine.schema_check import LIMITS, problems_of
from veneer_inference.ports import EngineError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

TOKENIZER_FILE = "tokenizer.json"
_KEPT = 64  # schemas, compiled or refused
# White space as people and programs write JSON: without a bound a model may go on with spaces for ever.
_STYLE: JsonCompileOptions = {"whitespace_pattern": "[ \\n]{0,16}", "lenient": False}


class Grammar:
    """One answer's way through its schema.

    Args:
        matcher: at its beginning; nobody else's.
        vocabulary: ids there are.
        end: id by which the matcher knows that an answer ends.
        stop_ids: any of which ends it.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int, end: int, stop_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._end = end
        self._stop_ids = stop_ids

    def allowed(self) -> NDArray[np.bool_]:
        """Which ids (V,) may come next.

        Raises:
            EngineError: `SCHEMA_UNSUPPORTED`: following the schema exceeds llguidance's limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed_V = np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(np.bool_)
        ends, allowed_V[self._end] = allowed_V[self._end], False
        allowed_V[list(self._stop_ids)] = ends
        return allowed_V

    def take(self, token: int) -> None:
        """The next token has been chosen.

        Raises:
            EngineError: `SCHEMA_UNSUPPORTED`, as in `allowed`, or the token was not allowed.
        """
        self._matcher.consume_token(self._end if token in self._stop_ids else token)
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
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._schemas: OrderedDict[str, LLMatcher | EngineError] = OrderedDict()

    def prepare(self) -> None:
        """Reads the tokenizer, if it can be used: llguidance holds Python's lock over it, for a second and more."""
        with contextlib.suppress(EngineError):
            self._read_tokenizer()

    def grammar(self, schema: str, stop_ids: tuple[int, ...]) -> Grammar:
        """The grammar of a JSON schema, at its beginning.

        Args:
            schema: JSON text.
            stop_ids: any of which ends an answer that is complete.

        Raises:
            EngineError: `SCHEMA_UNSUPPORTED`: it is no schema, or not one that llguidance can hold an answer to.
        """
        if not stop_ids:
            raise EngineError("SCHEMA_UNSUPPORTED", ["no token ends an answer"])
        tokenizer = self._read_tokenizer()
        with self._lock:
            found = self._schemas.get(schema)
        if found is None:  # compiled without the lock: who has a compiled one does not wait for it
            found = _compiled(schema, tokenizer)
        with self._lock:
            self._schemas[schema] = found
            self._schemas.move_to_end(schema)
            if len(self._schemas) > _KEPT:
                self._schemas.popitem(last=False)
            if isinstance(found, EngineError):
                raise EngineError(found.reason, found.problems)
            return Grammar(found.deep_copy(), self._vocabulary, tokenizer.eos_token, stop_ids)

    def _read_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                try:
                    self._tokenizer = LLTokenizer(self._file.read_text("utf-8"), self._vocabulary)
                except (OSError, ValueError, RuntimeError) as error:
                    raise EngineError("SCHEMA_UNSUPPORTED", [f"{self._file.name} cannot be used: {error}"]) from error
            return self._tokenizer


def _compiled(schema: str, tokenizer: LLTokenizer) -> LLMatcher | EngineError:
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_STYLE)
    except ValueError as error:
        return EngineError("SCHEMA_UNSUPPORTED", [f"it is no JSON object: {error}"])
    if problems := problems_of(grammar):
        return EngineError("SCHEMA_UNSUPPORTED", problems)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    return EngineError("SCHEMA_UNSUPPORTED", [matcher.get_error()]) if matcher.is_error() else matcher
