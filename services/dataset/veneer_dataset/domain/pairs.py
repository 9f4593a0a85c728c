"""The plain pair: `{"image": …, "text": …}` with optional `prompt` and `images`; the text is the answer."""

from typing import Any

from veneer_dataset.domain.draft import Draft, Part, list_of, text_of, text_part
from veneer_dataset.domain.findings import Refusal
from veneer_dataset.domain.tags import TAG, interleaved


def read(row: dict[str, Any], default_prompt: str) -> Draft:
    """See dialects.read_draft. Pictures stand before the prompt, or where it has `<image>` tags."""
    draft = Draft()
    pictures = _pictures(draft, row) if "image" in row or "images" in row else []
    prompt = row.get("prompt")
    prompt = default_prompt if prompt is None else text_of(prompt, "$.prompt")
    if TAG in prompt:
        if prompt.count(TAG) != len(pictures):
            raise Refusal("PICTURE_TAGS", "$.prompt", f"{prompt.count(TAG)} tags, {len(pictures)} pictures")
        parts = interleaved(prompt, iter(pictures))
    else:
        parts = [*pictures, text_part(prompt)] if prompt else pictures
    if not parts:
        raise Refusal("FIELD_MISSING", "$.image", "neither picture nor prompt")
    draft.say("user", parts, "$")
    text = row.get("text")
    if text is None or text == "":
        raise Refusal("ANSWER_MISSING", "$.text", row.get("text", "no text"))
    draft.say("assistant", [text_part(text_of(text, "$.text"))], "$.text")
    return draft


def _pictures(draft: Draft, row: dict[str, Any]) -> list[Part]:
    pictures = []
    for key in ("image", "images"):
        value = row.get(key)
        if type(value) is list:
            pictures += [draft.picture(each, f"$.{key}[{index}]") for index, each in enumerate(value)]
        elif value is not None:
            if key == "images":
                list_of(value, "$.images")
            pictures.append(draft.picture(value, f"$.{key}"))
    return pictures
