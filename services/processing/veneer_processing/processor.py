"""The one code path from a conversation to what the model reads, in training and in serving alike.

Owns the order of the steps and their results; each step is in a module of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from veneer_processing.contract import ProcessingContract
from veneer_processing.conversation import Conversation, Message, Picture, Text
from veneer_processing.errors import ContractMismatchError, ConversationError
from veneer_processing.model_directory import chat_template, pixel_settings
from veneer_processing.pictures import PICTURE_RULE
from veneer_processing.pixels import DEFAULT_MAX_PIXELS, INTERPOLATION, PixelBounds, PixelSettings
from veneer_processing.positions import rope_positions
from veneer_processing.template import MASK_RULE, ChatTemplate, filled, shape_of
from veneer_processing.tokenizer import SpecialIds, Tokenizer, tokenizer_digest

_COUNTED_AT_ONCE = 512
_CACHED_LITERALS = 1024
_CACHED_COUNTABLES = 1024
_CACHED_SHAPE_LENGTH = 256


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What the model reads: T tokens, n pictures, N patches.

    Attributes:
        ids_T: int64 token ids.
        positions_3_T: int64 rotary positions (time, row, column).
        rope_delta: token T+k, generated after these, stands at T + k + rope_delta on every axis.
        supervised_T: bool; which tokens are learned, as targets.
        grids_n_3: int64 frames (1), rows and columns of patches of each picture.
        patches_N_P: float32 patches of all pictures, or None where they were not asked for.
    """

    ids_T: NDArray[np.int64]
    positions_3_T: NDArray[np.int64]
    rope_delta: int
    supervised_T: NDArray[np.bool_]
    grids_n_3: NDArray[np.int64]
    patches_N_P: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """How many tokens a conversation has.

    Attributes:
        visual: those that stand for pictures.
        prompt: text tokens that are read and not learned.
        supervised: those that are learned.
    """

    visual: int
    prompt: int
    supervised: int

    @property
    def total(self) -> int:
        """All of them: the length of the sequence."""
        return self.visual + self.prompt + self.supervised


@dataclass(frozen=True, slots=True)
class _Countable:
    """What is counted of conversations of one shape: as little of the template's own text as possible.

    Attributes:
        fixed: tokens that do not depend on the texts.
        runs: stretches that are tokenised; literal texts, and indices of the conversation's texts.
        answers: which of the runs are answers.
        pictures: how many there are; `fixed` counts a token for each.
    """

    fixed: int
    runs: tuple[tuple[str | int, ...], ...]
    answers: tuple[int, ...]
    pictures: int


class Processor:
    """Turns conversations into ids, positions, mask and patches under one processing contract.

    Immutable, and safe to share between threads.

    Attributes:
        contract: what it follows.
        special: ids of the tokens that conversations are made of.
        pixels: what it does with pictures.
        model_bounds: the widest pixel bound a contract of this model may have.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        pixels: PixelSettings,
        model_bounds: PixelBounds,
        model_digest: str,
    ) -> None:
        """Puts the parts together; `load` and `under` are the ways to one."""
        self.special: SpecialIds = tokenizer.special
        self.pixels = pixels
        self.model_bounds = model_bounds
        self.contract = _contract(model_digest, tokenizer.digest, template.digest, pixels)
        self._tokenizer = tokenizer
        self._template = template
        self._literal_length = lru_cache(_CACHED_LITERALS)(lambda text: tokenizer.lengths([text])[0])
        self._cached_countable = lru_cache(_CACHED_COUNTABLES)(self._countable)

    @classmethod
    def load(cls, directory: Path, model_digest: str, bounds: PixelBounds | None = None) -> "Processor":
        """Reads a model directory; nothing but tokenizer, template and processor settings.

        Args:
            directory: of a model, as transformers saves one.
            model_digest: of the base model, put into the contract.
            bounds: on a picture's area; default: the model's own, at most `DEFAULT_MAX_PIXELS`.

        Raises:
            ModelDirectoryError: a file is missing or unusable, or (TemplateError) its template is.
            ContractMismatchError: the bounds are wider than the model's own, or admit not even one visual
                token.
        """
        settings = pixel_settings(directory)
        bounds = bounds or _usual_bounds(settings)
        _check_bounds(bounds, settings.bounds, settings.step)
        template = ChatTemplate(chat_template(directory))
        return cls(Tokenizer(directory), template, replace(settings, bounds=bounds), settings.bounds, model_digest)

    def under(self, contract: ProcessingContract) -> "Processor":
        """The processor of the same model that follows another contract: one with pixel bounds of its own.

        Tokenizer and template are shared, so this costs nothing.

        Raises:
            ContractMismatchError: the contract is another model's, or its bounds are wider than the model's
                own.
        """
        try:
            bounds = PixelBounds(contract.min_pixels, contract.max_pixels)
        except ValueError as error:
            raise ContractMismatchError((str(error),)) from error
        replace(self.contract, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels).require(contract)
        _check_bounds(bounds, self.model_bounds, self.pixels.step)
        pixels = replace(self.pixels, bounds=bounds)
        return Processor(self._tokenizer, self._template, pixels, self.model_bounds, self.contract.model_digest)

    def encode(self, conversation: Conversation, *, with_patches: bool = True) -> Encoded:
        """A whole conversation with its answers, for training and for scoring.

        Raises:
            ConversationError: no message is learned, or a text holds a control token.
            PictureError: a picture the model cannot be given.
            TemplateError: the chat template treats one of the texts by what it says.
        """
        last = conversation.messages[-1]
        if last.role != "assistant" or not any(_learned(conversation)):
            raise ConversationError("a conversation to learn ends with an assistant's message, and has one to learn")
        return self._encode(conversation, with_patches)

    def encode_prompt(self, conversation: Conversation, *, with_patches: bool = True) -> Encoded:
        """A conversation that waits for an answer, generation prompt included; nothing is supervised.

        Raises:
            ConversationError: it does not end with a user's message, or a text holds a control token.
            PictureError: a picture the model cannot be given.
            TemplateError: the chat template treats one of the texts by what it says.
        """
        if (role := conversation.messages[-1].role) != "user":
            raise ConversationError(f"a prompt ends with a user's message, got role {role}")
        encoded = self._encode(conversation, with_patches)
        return replace(encoded, supervised_T=np.zeros_like(encoded.supervised_T))

    def count(self, conversations: Sequence[Conversation]) -> list[TokenCounts]:
        """Tokens of each conversation, pictures by their size alone.

        A conversation that ends with a user's message is counted as `encode_prompt` reads it, else as
        `encode` does.

        Raises:
            ConversationError: a text holds a control token.
            PictureError: a picture the model cannot be given.
        """
        counts: list[TokenCounts] = []
        for start in range(0, len(conversations), _COUNTED_AT_ONCE):
            counts += self._count(conversations[start : start + _COUNTED_AT_ONCE])
        return counts

    def counts(self, encoded: Encoded) -> TokenCounts:
        """What `count` says of a conversation that is encoded already."""
        visual, supervised = int((encoded.ids_T == self.special.image_pad).sum()), int(encoded.supervised_T.sum())
        return TokenCounts(visual, len(encoded.ids_T) - visual - supervised, supervised)

    def with_patches(self, encoded: Encoded, conversation: Conversation) -> Encoded:
        """What was encoded without patches, with them; errors as `PixelSettings.patches`."""
        return replace(encoded, patches_N_P=self._all_patches(tuple(conversation.pictures)))

    def patches(self, picture: Picture) -> NDArray[np.float32]:
        """One picture's patches, as they stand in `Encoded`; errors as `PixelSettings.patches`."""
        return self.pixels.patches(picture)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens written out."""
        return self._tokenizer.decode(ids)

    def as_read(self, text: str) -> str:
        """The text as the model reads and learns it: ids decode to this, exactly.

        It differs from the text only where the text is not in the tokenizer's normal form (Qwen's: Unicode
        NFC).
        """
        return self._tokenizer.as_read(text)

    def _encode(self, conversation: Conversation, with_patches: bool) -> Encoded:
        shape, texts = self._checked(conversation)
        self._template.check(shape, texts)
        segments = self._template.layout(shape)
        ids: list[int] = []
        supervised: list[bool] = []
        learned = iter(_learned(conversation))
        after_learned = False
        for segment, its_ids in zip(
            segments, self._tokenizer.encode([each.filled(texts) for each in segments]), strict=True
        ):
            ids += its_ids
            if segment.is_answer:
                after_learned = next(learned)
                supervised += [after_learned] * len(its_ids)
            else:  # after an answer, its first id is the <|im_end|> that closes the answer
                supervised += [after_learned, *[False] * (len(its_ids) - 1)]
        pictures = tuple(conversation.pictures)
        grids_n_3 = np.array([self.pixels.grid(each) for each in pictures], np.int64).reshape(-1, 3)
        ids_t = np.array(ids, np.int64)
        width_t = np.ones(len(ids), np.int64)
        width_t[ids_t == self.special.image_pad] = grids_n_3.prod(axis=1) // self.pixels.merge_size**2
        ids_T = np.repeat(ids_t, width_t)
        positions_3_T, rope_delta = rope_positions(ids_T, grids_n_3, self.special.image_pad, self.pixels.merge_size)
        return Encoded(
            ids_T=ids_T,
            positions_3_T=positions_3_T,
            rope_delta=rope_delta,
            supervised_T=np.repeat(np.array(supervised, np.bool_), width_t),
            grids_n_3=grids_n_3,
            patches_N_P=self._all_patches(pictures) if with_patches else None,
        )

    def _all_patches(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        none = np.empty((0, self.pixels.patch_values), np.float32)
        return np.concatenate([none, *map(self.pixels.patches, pictures)])

    def _count(self, conversations: Sequence[Conversation]) -> list[TokenCounts]:
        countables: list[_Countable] = []
        runs: list[str] = []
        for conversation in conversations:
            shape, texts = self._checked(conversation)
            cached = len(shape) <= _CACHED_SHAPE_LENGTH
            countables.append(self._cached_countable(shape) if cached else self._countable(shape))
            for run in countables[-1].runs:
                only = run[0]
                runs.append(texts[only] if len(run) == 1 and isinstance(only, int) else filled(run, texts))
        different = list(dict.fromkeys(runs))  # prompts are often one, answers often classes
        length_of = dict(zip(different, self._tokenizer.lengths(different), strict=True))
        counts, start = [], 0
        for conversation, countable in zip(conversations, countables, strict=True):
            lengths = [length_of[run] for run in runs[start : start + len(countable.runs)]]
            start += len(lengths)
            supervised = 0
            if conversation.messages[-1].role != "user":
                learned = zip(countable.answers, _learned(conversation), strict=True)
                supervised = sum([lengths[answer] + 1 for answer, is_learned in learned if is_learned])
            visual = sum(map(self.pixels.visual_tokens, conversation.pictures)) if countable.pictures else 0
            text = countable.fixed + sum(lengths) - countable.pictures
            counts.append(TokenCounts(visual, text - supervised, supervised))
        return counts

    def _countable(self, shape: str) -> _Countable:
        fixed = 0
        runs: list[tuple[str | int, ...]] = []
        answers: list[int] = []
        for segment in self._template.layout(shape):
            if segment.is_answer:
                answers.append(len(runs))
                runs.append(segment.pieces)
                continue
            stretches: list[list[str | int]] = [[]]
            for piece in segment.pieces:
                if isinstance(piece, int):
                    stretches[-1].append(piece)
                    continue
                first, *rest = self._tokenizer.apart(piece)
                stretches[-1].append(first)
                stretches += [[each] for each in rest]
            for stretch in stretches:
                if any(isinstance(piece, int) for piece in stretch):
                    runs.append(tuple(stretch))
                else:
                    fixed += self._literal_length(filled(stretch, ()))
        return _Countable(fixed, tuple(runs), tuple(answers), shape.count("p"))

    def _checked(self, conversation: Conversation) -> tuple[str, list[str]]:
        """Shape and texts of a conversation none of whose texts holds a control token.

        Pieces of one message are looked at as one text too: the template may write them side by side.
        """
        shape, texts = shape_of(conversation)
        if self._tokenizer.control_token_in("".join(texts)) is None:
            return shape, texts
        problems = [
            f"messages[{index}]{_part_with(message, token)}: a text holds the control token {token}"
            for index, message in enumerate(conversation.messages)
            if (token := self._tokenizer.control_token_in(message.text)) is not None
        ]
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ConversationError("; ".join(problems[:5]) + more)
        return shape, texts


def _learned(conversation: Conversation) -> list[bool]:
    """For each assistant's message, whether it is learned."""
    return [message.supervised for message in conversation.messages if message.role == "assistant"]


def _part_with(message: Message, token: str) -> str:
    """The place of a control token inside a message, empty where it lies across parts."""
    for index, part in enumerate(message.parts):
        if isinstance(part, Text) and token in part.text:
            return f".parts[{index}]"
    return ""


def read_contract(directory: Path, model_digest: str) -> tuple[ProcessingContract, PixelBounds]:
    """The contract that `Processor.load` would follow, and the model's own bounds.

    The tokenizer is hashed, not read: that would take most of a second and 100 MB.

    Raises:
        ModelDirectoryError: a file is missing or unusable, or (TemplateError) its template is.
    """
    settings = pixel_settings(directory)
    template = ChatTemplate(chat_template(directory))
    pixels = replace(settings, bounds=_usual_bounds(settings))
    return _contract(model_digest, tokenizer_digest(directory), template.digest, pixels), settings.bounds


def _contract(
    model_digest: str, tokenizer_digest: str, template_digest: str, pixels: PixelSettings
) -> ProcessingContract:
    return ProcessingContract(
        model_digest=model_digest,
        tokenizer_digest=tokenizer_digest,
        template_digest=template_digest,
        min_pixels=pixels.bounds.min_pixels,
        max_pixels=pixels.bounds.max_pixels,
        patch_size=pixels.patch_size,
        merge_size=pixels.merge_size,
        temporal_patch_size=pixels.temporal_patch_size,
        interpolation=INTERPOLATION,
        image_mean=pixels.image_mean,
        image_std=pixels.image_std,
        picture_rule=PICTURE_RULE,
        mask_rule=MASK_RULE,
    )


def _usual_bounds(settings: PixelSettings) -> PixelBounds:
    own = settings.bounds
    return PixelBounds(min(own.min_pixels, DEFAULT_MAX_PIXELS), min(own.max_pixels, DEFAULT_MAX_PIXELS))


def _check_bounds(bounds: PixelBounds, own: PixelBounds, step: int) -> None:
    differences = []
    if bounds.max_pixels > own.max_pixels:
        differences.append(f"max_pixels: this model takes up to {own.max_pixels}, got {bounds.max_pixels}")
    if bounds.max_pixels < step * step:
        differences.append(f"max_pixels: one visual token takes {step * step}, got {bounds.max_pixels}")
    if differences:
        raise ContractMismatchError(tuple(differences))
