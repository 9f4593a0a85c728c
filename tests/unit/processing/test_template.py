from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from veneer_processing import Conversation, Message, Picture, TemplateError, Text
from veneer_processing.template import ChatTemplate, shape_of

PICTURE = Picture("d" * 64, 64, 64)

PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The least template of Qwen's form."""

THOUGHTS_DROPPED = PLAIN.replace(
    "{{ part.text }}",
    "{{ part.text.split('</think>')[-1] if message.role == 'assistant' and not loop.last else part.text }}",
)


checked = cache(ChatTemplate)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(PLAIN)


def test_a_shape_is_roles_and_parts() -> None:
    conversation = Conversation(
        (
            Message("system", (Text("a"),)),
            Message("user", (PICTURE, Text("b"), PICTURE)),
            Message("assistant", (Text("c"), Text("d"))),
            Message("user", (Text("e"),)),
        )
    )
    assert shape_of(conversation) == ("StUptpAtUt", ["a", "b", "cd", "e"])


def test_a_conversation_is_cut_at_its_answers(template: ChatTemplate) -> None:
    segments = [(each.filled(["Q", "A", "R"]), each.is_answer) for each in template.layout("UptAtUt")]
    assert segments == [
        (
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Q<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("A", True),
        ("<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n", False),
    ]


texts = st.text(st.characters(exclude_categories=["Cs"]))
turns = st.lists(
    st.tuples(st.lists(st.one_of(texts, st.none()), min_size=1, max_size=4), texts), min_size=1, max_size=4
)


@given(system=st.one_of(st.none(), texts), turns=turns, is_prompt=st.booleans())
def test_it_renders_as_transformers_does(
    base: Path, system: str | None, turns: list[tuple[list[str | None], str]], is_prompt: bool
) -> None:
    ours: list[Message] = [] if system is None else [Message("system", (Text(system),))]
    theirs: list[dict[str, object]] = []
    for question, answer in turns:
        parts = tuple(PICTURE if each is None else Text(each) for each in question)
        ours += [Message("user", parts), Message("assistant", (Text(answer),))]
    ours = ours[:-1] if is_prompt else ours
    for message in ours:
        content = [
            {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image"} for p in message.parts
        ]
        theirs.append({"role": message.role, "content": content})
    for source in (PLAIN, (base / "chat_template.jinja").read_text(encoding="utf-8")):
        template = checked(source)
        shape, own = shape_of(Conversation(tuple(ours)))
        expected, _ = render_jinja_template([theirs], chat_template=source, add_generation_prompt=is_prompt)
        assert "".join(segment.filled(own) for segment in template.layout(shape)) == expected[0]
        assert template.render(shape, own) == expected[0]


REFUSED = {
    "not jinja": ("{% if %}", "does not compile"),
    "a tag of another dialect": ("{% generation %}{% endgeneration %}" + PLAIN, "does not compile"),
    "reads a special token": (PLAIN + "{{ eos_token }}", "reads eos_token"),
    "reads the date": ("{{ strftime_now('%Y') }}" + PLAIN, "reads strftime_now"),
    "holds the placeholder": ("\ue000" + PLAIN, r"U\+E000"),
    "refuses a plain conversation": ("{{ raise_exception('not today') }}", "TemplateError: not today"),
    "reaches out of the sandbox": ("{{ messages.__class__.__mro__ }}" + PLAIN, "SecurityError"),
    "changes a message": ("{{ messages.append(1) }}" + PLAIN, "SecurityError"),
    "fails": ("{{ 1 // 0 }}" + PLAIN, "ZeroDivisionError"),
    "never ends": ("{% for i in range(10 ** 9) %}{% endfor %}" + PLAIN, "OverflowError"),
    "drops the system message": (
        PLAIN.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"),
        "drops, repeats or reorders texts",
    ),
    "repeats a text": (PLAIN.replace("{{ part.text }}", "{{ part.text }}{{ part.text }}"), "repeats"),
    "has no pictures": (PLAIN.replace("<|image_pad|>", ""), r"<\|image_pad\|> 0 times, not 1"),
    "has two pads for a picture": (
        PLAIN.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"),
        "2 times, not 1",
    ),
    "trims texts": (PLAIN.replace("part.text", "part.text | trim"), "by what they say"),
    "drops empty texts": (PLAIN.replace("{{ part.text }}", "{{ part.text or 'none' }}"), "by what they say"),
    "drops thoughts": (THOUGHTS_DROPPED.replace("not loop.last", "true"), "by what they say"),
    "has no generation prompt": (PLAIN.replace("add_generation_prompt", "false"), "not prefix-stable"),
    "has another generation prompt": (
        PLAIN.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"),
        "between '<|im_start|>assistant\\\\n<think>\\\\n' and",
    ),
    "ends an answer otherwise": (PLAIN.replace("<|im_end|>\n", "</s>\n"), r"and <\|im_end\|>"),
    "counts the messages first": ("{{ messages | length }} messages\n" + PLAIN, "not prefix-stable"),
    "tells whether a message is the last": (
        PLAIN.replace("<|im_end|>\n", "<|im_end|>{{ '' if loop.last else '\n' }}\n"),
        "not prefix-stable",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_does_not_admit_the_rule_is_refused_with_the_reason(name: str) -> None:
    source, words = REFUSED[name]
    with pytest.raises(TemplateError, match=words.replace("|", r"\|") if "'" in words else words) as refusal:
        ChatTemplate(source)
    assert len(str(refusal.value).encode()) <= 512


def test_what_the_probes_did_not_say_is_found_when_it_is_said() -> None:
    template = ChatTemplate(PLAIN.replace("part.text", "part.text | replace('abracadabra', '')"))
    template.check("UtAt", ["a question", "an answer"])
    with pytest.raises(TemplateError, match="by what they say"):
        template.check("UtAt", ["abracadabra?", "an answer"])


def test_tojson_is_transformers_own() -> None:
    source = "{{ {'b': '<é>', 'a': 1} | tojson }}" + PLAIN
    expected, _ = render_jinja_template(
        [[{"role": "user", "content": [{"type": "text", "text": "?"}]}]],
        chat_template=source,
        add_generation_prompt=True,
    )
    assert ChatTemplate(source).render("Ut", ["?"]) == expected[0]


def test_the_sandbox_is_the_immutable_one() -> None:
    with pytest.raises(TemplateError) as refusal:
        ChatTemplate("{{ messages.clear() }}" + PLAIN)
    assert isinstance(refusal.value.__cause__, SecurityError)
