"""A model's chat template, and the layout it gives a conversation.

Owns rendering (jinja2 in its sandbox, with what transformers gives templates), the split into segments that
are tokenised apart, and the proof that a template admits that split: `MASK_RULE`. Ids are in `tokenizer`.

The rule. A template's text around the messages depends on their roles and parts alone, so it is rendered once
for each *shape* of a conversation. The text is then cut before and after each assistant's answer, and the
pieces are tokenised apart, just as serving reads them: a prompt ends with the generation prompt, and the
answer comes token by token. For most texts that gives the ids of the whole text. It does not where an answer
begins with white space that holds a line break, which tokenising the whole text would merge with the line
break before it. An answer's ids and the closing <|im_end|> are learned, unless the message is unsupervised.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from veneer_processing.conversation import Conversation, Text
from veneer_processing.errors import TemplateError

MASK_RULE = "answer-and-end-apart-1"
"""Name of the rule above; part of the processing contract."""

IMAGE_PAD = "<|image_pad|>"
IM_END = "<|im_end|>"

_OPEN, _CLOSE = "\ue000", "\ue001"
_SLOT = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_CACHED_SHAPES = 1024
_CACHED_SHAPE_LENGTH = 256

_PROBE_SHAPES = ("UtAt", "StUtAt", "UptAt", "StUppttAtUtpAtUtAt", "UtUtAtAt")
_PROBE_TEXTS = (
    "Hello.",
    "",
    " \n two words \n ",
    "<think>\nwhy\n</think>\n\nThat is why.",
    "你好,世界 😀",
    '<tool_call>\n{"name": "a"}\n</tool_call>',
    '<tool_response>\n{{ 1 + 1 }} {% if %} & "quoted"\n</tool_response>',
    "/no_think system user assistant",
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a conversation's text that is tokenised by itself.

    Attributes:
        pieces: literal texts, and indices of the conversation's texts.
        is_answer: whether it is an assistant's answer.
    """

    pieces: tuple[str | int, ...]
    is_answer: bool

    def filled(self, texts: Sequence[str]) -> str:
        """Its text, with the conversation's texts put in."""
        return filled(self.pieces, texts)


def filled(pieces: Sequence[str | int], texts: Sequence[str]) -> str:
    """Pieces of a segment as one text, with the conversation's texts put in."""
    return "".join([piece if isinstance(piece, str) else texts[piece] for piece in pieces])


def shape_of(conversation: Conversation) -> tuple[str, list[str]]:
    """A conversation's shape and texts.

    The shape has a capital for each message's role (S, U, A), followed by t and p for its texts and pictures;
    an assistant's texts count as one.
    """
    shape: list[str] = []
    texts: list[str] = []
    for message in conversation.messages:
        if message.role == "assistant":
            shape.append("At")
            texts.append(message.text)
            continue
        shape.append("S" if message.role == "system" else "U")
        for part in message.parts:
            if isinstance(part, Text):
                shape.append("t")
                texts.append(part.text)
            else:
                shape.append("p")
    return "".join(shape), texts


class ChatTemplate:
    """A chat template that was shown to admit the mask rule.

    Attributes:
        digest: SHA-256 of its text in UTF-8.
    """

    def __init__(self, source: str) -> None:
        """Compiles the template and tries it on probe conversations.

        Raises:
            TemplateError: it does not compile, reads what would make it irreproducible, fails on a plain
                conversation, looks at what a text says, or is not prefix-stable.
        """
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            reads = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not compile: {error}"[:500]) from error
        refused = sorted(name for name in reads if name.endswith(("_token", "_tokens")) or name == "strftime_now")
        if refused:
            raise TemplateError(f"the chat template reads {', '.join(refused)}, which is not part of a conversation")
        if _OPEN in source:
            raise TemplateError(f"the chat template holds the character U+{ord(_OPEN):04X}")
        self._generation_prompt = self._difference("Ut")
        self._cached_layout = lru_cache(_CACHED_SHAPES)(self._layout)
        for shape in _PROBE_SHAPES:
            self._probe(shape)

    def layout(self, shape: str) -> tuple[Segment, ...]:
        """Segments of a conversation of this shape, in order.

        A shape that ends with a user's message is a prompt: the generation prompt is added.

        Raises:
            TemplateError: the template gives a text of this shape no place, or a place the mask rule does not
                admit.
        """
        return self._cached_layout(shape) if len(shape) <= _CACHED_SHAPE_LENGTH else self._layout(shape)

    def render(self, shape: str, texts: Sequence[str]) -> str:
        """The text that the template itself makes of a conversation.

        Raises:
            TemplateError: it fails.
        """
        last_role = re.findall("[SUA]", shape)[-1]
        return self._render(shape, texts, add_generation_prompt=last_role != "A")

    def check(self, shape: str, texts: Sequence[str]) -> None:
        """Checks that the layout, filled, is what the template makes of a conversation.

        Raises:
            TemplateError: it is not: the template looks at what a text says.
        """
        filled = "".join([segment.filled(texts) for segment in self.layout(shape)])
        if filled != self.render(shape, texts):
            raise TemplateError("the chat template treats texts by what they say: it changed or moved one")

    def _probe(self, shape: str) -> None:
        """Shows on awkward texts that the template only places texts, and that it is prefix-stable."""
        for first in range(len(_PROBE_TEXTS)):
            texts = list(islice(cycle(_PROBE_TEXTS), first, first + shape.count("t")))
            self.check(shape, texts)
            answers = re.finditer("A", shape)
            read = ""
            for segment in self.layout(shape):
                if segment.is_answer:
                    before = shape[: next(answers).start()]
                    prompt = self._render(before, texts[: before.count("t")], add_generation_prompt=True)
                    if prompt != read:
                        raise TemplateError(
                            "the chat template is not prefix-stable: what serving reads before an answer is "
                            f"not how the whole conversation begins (shape {shape}, before {before})"
                        )
                read += segment.filled(texts)

    def _layout(self, shape: str) -> tuple[Segment, ...]:
        roles_of_texts = [run[0] for run in re.findall("[SUA][tp]*", shape) for kind in run if kind == "t"]
        rendered = self.render(shape, [f"{_OPEN}{index}{_CLOSE}" for index in range(len(roles_of_texts))])
        pieces = _SLOT.split(rendered)
        literals, slots = pieces[::2], pieces[1::2]
        if slots != [str(index) for index in range(len(roles_of_texts))]:
            raise TemplateError(f"the chat template drops, repeats or reorders texts (shape {shape[:80]})")
        pictures = shape.count("p")
        if (pads := rendered.count(IMAGE_PAD)) != pictures:
            raise TemplateError(
                f"the chat template writes {IMAGE_PAD} {pads} times, not {pictures} (shape {shape[:80]})"
            )
        segments: list[Segment] = []
        context: list[str | int] = [literals[0]]
        for index, (role, literal) in enumerate(zip(roles_of_texts, literals[1:], strict=True)):
            if role == "A":
                if not str(context[-1]).endswith(self._generation_prompt) or not literal.startswith(IM_END):
                    raise TemplateError(
                        f"the chat template does not put an answer between {self._generation_prompt!r} "
                        f"and {IM_END} (shape {shape[:80]})"
                    )
                segments += [Segment(tuple(context), False), Segment((index,), True)]
                context = [literal]
            else:
                context += [index, literal]
        return (*segments, Segment(tuple(context), False))

    def _difference(self, shape: str) -> str:
        """What the generation prompt adds to a conversation."""
        without = self._render(shape, ["Hello."], add_generation_prompt=False)
        return self._render(shape, ["Hello."], add_generation_prompt=True).removeprefix(without)

    def _render(self, shape: str, texts: Sequence[str], *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(messages=_messages(shape, texts), add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateError(
                f"the chat template failed with {type(error).__name__}: {error}"[:400] + f" (shape {shape[:80]})"
            ) from error


def _messages(shape: str, texts: Sequence[str]) -> list[dict[str, object]]:
    """The messages as templates take them: contents are lists of parts."""
    messages: list[dict[str, object]] = []
    roles = {"S": "system", "U": "user", "A": "assistant"}
    remaining = iter(texts)
    for kind in shape:
        if kind in roles:
            content: list[dict[str, str]] = []
            messages.append({"role": roles[kind], "content": content})
        else:
            content.append({"type": "text", "text": next(remaining)} if kind == "t" else {"type": "image"})
    return messages


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a template (transformers, utils/chat_template_utils.py), the date excepted."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
