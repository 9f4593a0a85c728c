"""A conversation becomes what transformers' own processor makes of it, and its answers stay what they are."""

import io
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen3VLProcessor

from veneer_processing import (
    ContractMismatchError,
    Conversation,
    ConversationError,
    Message,
    Part,
    Picture,
    PictureError,
    PixelBounds,
    ProcessingError,
    Processor,
    TemplateError,
    Text,
    TokenCounts,
    open_picture,
)

RNG = np.random.default_rng(3)
IM_END = 151_645


def file_of(height: int, width: int, mode: str = "RGB", orientation: int = 1) -> bytes:
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, "PNG", exif=exif)
    return out.getvalue()


PICTURES = {
    name: open_picture(data)
    for name, data in {
        "small": file_of(20, 30),
        "odd": file_of(333, 517),
        "turned": file_of(90, 200, orientation=6),
        "palette": file_of(100, 100, "P"),
        "tall": file_of(1_000, 40),
    }.items()
}


def user(*parts: str | Picture) -> Message:
    return Message("user", tuple(_part(each) for each in parts))


def assistant(*texts: str, supervised: bool = True) -> Message:
    return Message("assistant", tuple(Text(each) for each in texts), supervised)


def system(text: str) -> Message:
    return Message("system", (Text(text),))


def _part(value: str | Picture) -> Part:
    return Text(value) if isinstance(value, str) else value


def talk(*messages: Message) -> Conversation:
    return Conversation(messages)


def as_theirs(conversation: Conversation) -> list[dict[str, object]]:
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, Text)
                else {"type": "image", "image": Image.fromarray(part.rgb)}
                for part in message.parts
            ],
        }
        for message in conversation.messages
    ]


CONVERSATIONS = {
    "text": talk(user("What is this?"), assistant("A test.")),
    "system": talk(system("Answer in one word."), user("Colour?"), assistant("Blue")),
    "one picture": talk(user(PICTURES["small"], "What is this?"), assistant("Noise.")),
    "a picture after the text": talk(user("What is this? ", PICTURES["odd"]), assistant("Noise.")),
    "several pictures": talk(
        user(PICTURES["odd"], PICTURES["turned"], " and ", PICTURES["palette"], "?"), assistant("Noise.")
    ),
    "a picture alone": talk(user(PICTURES["tall"]), assistant("Noise.")),
    "Chinese": talk(
        user(PICTURES["turned"], "这张发票的金额是多少?"), assistant("这是一张金额为 ¥8,650 的增值税发票。")
    ),
    "emoji": talk(user("😀👩‍👩‍👧‍👦🇨🇳"), assistant("👍🏽 ok ✨")),
    "code": talk(user("def f(x):\n\treturn x\n\n\n"), assistant("```python\nf(1)\n```\n")),
    "JSON": talk(user('{"a": [1, 2]}'), assistant('{"金额": "8,650.00"}')),
    "several turns": talk(
        system("Be brief."),
        user(PICTURES["small"], "First?"),
        assistant("One."),
        user("And?", PICTURES["odd"]),
        assistant("Two.\n"),
        user("既然如此?"),
        assistant("三。"),
    ),
    "several texts in a message": talk(user("one", " ", "two"), assistant("a", "b c")),
    "two questions in a row": talk(user("One?"), user("Two?"), assistant("Both.")),
    "an answer that thinks": talk(user("Why?"), assistant("<think>\nhm\n</think>\n\nSo.")),
    "blanks before an answer": talk(user("Why?"), assistant("  So.")),
    "an empty answer": talk(user("Why?"), assistant("")),
    "a space at the end of a question": talk(user("Why? \n "), assistant("So. \n ")),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_it_reads_what_transformers_reads(name: str, processor: Processor, reference: Qwen3VLProcessor) -> None:
    conversation = CONVERSATIONS[name]
    theirs = reference.apply_chat_template(
        as_theirs(conversation), tokenize=True, return_dict=True, return_tensors="np"
    )
    encoded = processor.encode(conversation)
    np.testing.assert_array_equal(encoded.ids_T, theirs["input_ids"][0])
    assert encoded.patches_N_P is not None
    if list(conversation.pictures):
        np.testing.assert_array_equal(encoded.patches_N_P, theirs["pixel_values"])
        np.testing.assert_array_equal(encoded.grids_n_3, theirs["image_grid_thw"])
    else:
        assert encoded.patches_N_P.shape == (0, 1_536)
        assert encoded.grids_n_3.shape == (0, 3)
    np.testing.assert_array_equal(encoded.ids_T == processor.special.image_pad, theirs["mm_token_type_ids"][0] == 1)
    later = processor.with_patches(processor.encode(conversation, with_patches=False), conversation)
    np.testing.assert_array_equal(later.patches_N_P, encoded.patches_N_P)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_prompt_is_what_transformers_prompts_with(
    name: str, processor: Processor, reference: Qwen3VLProcessor
) -> None:
    prompt = Conversation(CONVERSATIONS[name].messages[:-1])
    theirs = reference.apply_chat_template(
        as_theirs(prompt), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    encoded = processor.encode_prompt(prompt)
    np.testing.assert_array_equal(encoded.ids_T, theirs["input_ids"][0])
    assert not encoded.supervised_T.any()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_training_reads_what_serving_reads_and_writes(name: str, processor: Processor) -> None:
    conversation = CONVERSATIONS[name]
    whole = processor.encode(conversation, with_patches=False)
    assert whole.patches_N_P is None
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        prompt = processor.encode_prompt(Conversation(conversation.messages[:index]), with_patches=False)
        read = len(prompt.ids_T)
        np.testing.assert_array_equal(whole.ids_T[:read], prompt.ids_T)
        np.testing.assert_array_equal(whole.positions_3_T[:, :read], prompt.positions_3_T)
        written = whole.ids_T[read : read + list(whole.ids_T[read:]).index(IM_END) + 1]
        assert processor.decode(written[:-1]) == message.text
        # Where serving continues is where training stands.
        continued = np.arange(read, read + len(written)) + prompt.rope_delta
        np.testing.assert_array_equal(whole.positions_3_T[:, read : read + len(written)], continued[None].repeat(3, 0))
        assert whole.supervised_T[read : read + len(written)].all()
        assert not whole.supervised_T[read + len(written)]


def learned(processor: Processor, conversation: Conversation) -> list[str]:
    """The texts of the supervised runs, each without its <|im_end|>."""
    encoded = processor.encode(conversation, with_patches=False)
    ids = encoded.ids_T[encoded.supervised_T]
    ends = np.flatnonzero(ids == IM_END)
    starts = [0, *(ends[:-1] + 1)]
    assert ends[-1] == len(ids) - 1
    return [processor.decode(ids[start:end]) for start, end in zip(starts, ends, strict=True)]


# Hypothesis tries the constants it finds in the code, control tokens too; without a bar there is none.
any_text = st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="|"))
awkward = st.sampled_from(
    ["", " ", "\n", "\r\n", "\n\n x", " \n", "\0", "\u2028", "e\u0301", "<think>", "<|im_", "end|>"]
)
answers = st.one_of(any_text, awkward, st.builds("".join, st.lists(st.one_of(awkward, any_text), max_size=4)))


@given(turns=st.lists(st.tuples(any_text, answers), min_size=1, max_size=4))
def test_what_is_learned_decodes_to_the_answers_exactly(processor: Processor, turns: list[tuple[str, str]]) -> None:
    texts = [unicodedata.normalize("NFC", answer).replace("<|im_end|>", "") for _, answer in turns]
    messages = [m for (q, _), a in zip(turns, texts, strict=True) for m in (user(q), assistant(a))]
    assert learned(processor, talk(*messages)) == texts


def test_an_answer_that_is_not_nfc_is_learned_as_read(processor: Processor) -> None:
    decomposed = "cafe\u0301"
    assert processor.as_read(decomposed) == "café"
    assert learned(processor, talk(user("?"), assistant(decomposed))) == ["café"]


def test_an_answer_that_begins_with_a_line_break_is_read_as_serving_writes_it(
    processor: Processor, reference: Qwen3VLProcessor
) -> None:
    conversation = talk(user("Why?"), assistant("\nSo."))
    theirs = reference.apply_chat_template(as_theirs(conversation), tokenize=True)[0]
    ours = processor.encode(conversation).ids_T.tolist()
    assert ours != theirs  # theirs holds one id for the two line breaks, which no prompt ends with
    assert processor.decode(ours) == processor.decode(theirs)
    assert learned(processor, conversation) == ["\nSo."]


def test_a_message_of_weight_0_is_read_and_not_learned(processor: Processor) -> None:
    turns = (user("1?"), assistant("one"), user("2?"), assistant("two"), user("3?"), assistant("three"))
    weights = (True, False, True)
    chosen = [replace(m, supervised=weights[i // 2]) for i, m in enumerate(turns)]
    assert learned(processor, talk(*chosen)) == ["one", "three"]
    np.testing.assert_array_equal(processor.encode(talk(*chosen)).ids_T, processor.encode(talk(*turns)).ids_T)


@pytest.mark.parametrize(
    "conversation",
    [
        talk(user("?")),
        talk(user("?"), assistant("!", supervised=False)),
        talk(user("?"), assistant("!"), user("?")),
    ],
)
def test_a_conversation_without_a_last_answer_to_learn_is_refused(
    processor: Processor, conversation: Conversation
) -> None:
    with pytest.raises(ConversationError, match="ends with an assistant's message, and has one to learn"):
        processor.encode(conversation)


def test_a_prompt_ends_with_a_question(processor: Processor) -> None:
    with pytest.raises(ConversationError, match="ends with a user's message, got role assistant"):
        processor.encode_prompt(talk(user("?"), assistant("!")))


CONTROL = {
    "<|image_pad|>": (user("a<|image_pad|>b"), r"messages\[0\].parts\[0\].*<\|image_pad\|>"),
    "<|im_end|> after a picture": (
        user(PICTURES["small"], "<|im_end|>"),
        r"messages\[0\].parts\[1\].*<\|im_end\|>",
    ),
    "across parts": (user("<|im_", "end|>"), r"messages\[0\]: a text holds the control token <\|im_end\|>"),
    "a system prompt": (system("<|im_start|>assistant"), r"messages\[0\].parts\[0\].*<\|im_start\|>"),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_tokens_written_in_a_text_are_refused(processor: Processor, name: str) -> None:
    message, words = CONTROL[name]
    rest = (user("?"), assistant("!")) if message.role == "system" else (assistant("!"),)
    conversation = talk(message, *rest)
    actions: list[Callable[[], object]] = [
        lambda: processor.encode(conversation),
        lambda: processor.encode_prompt(Conversation(conversation.messages[:-1])),
        lambda: processor.count([conversation]),
    ]
    for action in actions:
        with pytest.raises(ConversationError, match=words):
            action()


def test_control_tokens_are_refused_all_at_once_and_in_few_words(processor: Processor) -> None:
    turns = [m for n in range(20) for m in (user(f"{n}<|im_end|>"), assistant("<|endoftext|>"))]
    with pytest.raises(ConversationError, match=r"messages\[0\].*messages\[1\].*and 35 more") as refusal:
        processor.count([talk(*turns)])
    assert len(str(refusal.value).encode()) <= 512


parts = st.lists(st.one_of(st.sampled_from(list(PICTURES.values())), any_text), min_size=1, max_size=4)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), any_text),
            st.lists(st.tuples(parts, any_text, st.booleans()), min_size=1, max_size=3),
        ),
        max_size=4,
    )
)
def test_counts_are_those_of_what_is_read(
    processor: Processor,
    drawn: Sequence[tuple[str | None, list[tuple[list[str | Picture], str, bool]]]],
) -> None:
    conversations = [
        talk(
            *([] if first is None else [system(first)]),
            *(m for q, a, learn in turns for m in (user(*q), assistant(a, supervised=learn))),
            assistant("last"),
        )
        for first, turns in drawn
    ]
    prompts = [Conversation(each.messages[:-2]) for each in conversations]
    expected = []
    for encoded in [
        *(processor.encode(each, with_patches=False) for each in conversations),
        *(processor.encode_prompt(each, with_patches=False) for each in prompts),
    ]:
        visual = int((encoded.ids_T == processor.special.image_pad).sum())
        supervised = int(encoded.supervised_T.sum())
        expected.append(TokenCounts(visual, len(encoded.ids_T) - visual - supervised, supervised))
        assert processor.counts(encoded) == expected[-1]
    assert processor.count([_without_pixels(each) for each in (*conversations, *prompts)]) == expected


def _without_pixels(conversation: Conversation) -> Conversation:
    return Conversation(
        tuple(
            replace(m, parts=tuple(replace(p, rgb=None) if isinstance(p, Picture) else p for p in m.parts))
            for m in conversation.messages
        )
    )


def test_a_conversation_of_many_turns_is_read_in_linear_time(processor: Processor) -> None:
    # A template rendered for each of 5,000 answers would take minutes.
    conversation = talk(*[m for _ in range(5_000) for m in (user("?"), assistant("!"))])
    (count,) = processor.count([conversation])
    assert count.supervised == 10_000
    assert len(processor.encode(conversation, with_patches=False).ids_T) == count.total


def test_a_picture_that_cannot_be_given_is_refused(processor: Processor) -> None:
    thin = Picture("e" * 64, 1, 20_000)
    for action in (processor.encode, lambda each: processor.count([each])):
        with pytest.raises(PictureError, match="200 times as long as wide, got 1x20000"):
            action(talk(user(thin), assistant("!")))


def test_default_bounds_are_448_squared_within_the_models_own(make_directory: Callable[..., Path], base: Path) -> None:
    settings_file = (base / "preprocessor_config.json").read_text(encoding="utf-8")
    directory = make_directory(
        preprocessor_config__json=settings_file.replace("200704", "16777216").replace("4096", "65536")
    )
    processor = Processor.load(directory, "0" * 64)
    assert processor.pixels.bounds == PixelBounds(65_536, 200_704)
    assert processor.model_bounds == PixelBounds(65_536, 16_777_216)
    wider = Processor.load(directory, "0" * 64, PixelBounds(1_024, 16_777_216))
    assert (wider.contract.min_pixels, wider.contract.max_pixels) == (1_024, 16_777_216)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (PixelBounds(1, 200_705), "max_pixels: this model takes up to 200704, got 200705"),
        (PixelBounds(1, 1_023), "max_pixels: one visual token takes 1024, got 1023"),
    ],
)
def test_bounds_beyond_the_model_are_refused(base: Path, processor: Processor, bounds: PixelBounds, words: str) -> None:
    with pytest.raises(ContractMismatchError, match=words):
        Processor.load(base, "0" * 64, bounds)
    with pytest.raises(ContractMismatchError, match=words):
        processor.under(replace(processor.contract, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels))


def test_an_adapters_own_bounds_are_followed(base: Path, processor: Processor) -> None:
    contract = replace(processor.contract, max_pixels=50_000)
    own = processor.under(contract)
    assert own.contract == contract
    conversation = CONVERSATIONS["several pictures"]
    fresh = Processor.load(base, contract.model_digest, PixelBounds(contract.min_pixels, 50_000))
    assert own.contract == fresh.contract
    np.testing.assert_array_equal(own.encode(conversation).patches_N_P, fresh.encode(conversation).patches_N_P)
    assert len(own.encode(conversation).ids_T) < len(processor.encode(conversation).ids_T)


def test_a_contract_of_another_model_is_refused_with_every_difference(processor: Processor) -> None:
    other = replace(
        processor.contract, model_digest="1" * 64, template_digest="2" * 64, mask_rule="another", max_pixels=1
    )
    with pytest.raises(ContractMismatchError, match="pixel bounds are"):
        processor.under(other)
    with pytest.raises(ContractMismatchError) as refusal:
        processor.under(replace(other, max_pixels=50_000))
    assert [each.split(":")[0] for each in refusal.value.differences] == [
        "model_digest",
        "template_digest",
        "mask_rule",
    ]


def test_a_text_that_the_template_treats_by_what_it_says_is_refused(
    make_directory: Callable[..., Path], base: Path
) -> None:
    source = (base / "chat_template.jinja").read_text(encoding="utf-8")
    changed = source.replace("part.text", "part.text | replace('abracadabra', '')")
    processor = Processor.load(make_directory(chat_template__jinja=changed), "0" * 64)
    processor.encode(CONVERSATIONS["text"])
    with pytest.raises(TemplateError, match="by what they say"):
        processor.encode(talk(user("abracadabra"), assistant("!")))


def test_every_refusal_is_a_processing_error() -> None:
    for error in (ContractMismatchError, ConversationError, PictureError, TemplateError):
        assert issubclass(error, ProcessingError)
