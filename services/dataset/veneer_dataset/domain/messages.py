"""`{"messages": […]}` with `image_url` parts, as OpenAI's vision fine-tuning writes rows."""

from typing import Any

from veneer_dataset.domain.draft import Draft, Part, list_of, object_of, text_of, text_part
from veneer_dataset.domain.findings import Refusal

ROLES = ("system", "user", "assistant")


def read(row: dict[str, Any], default_prompt: str) -> Draft:
    """See dialects.read_draft; the default prompt is for pairs only."""
    draft = Draft()
    for index, message in enumerate(list_of(row["messages"], "$.messages")):
        place = f"$.messages[{index}]"
        message = object_of(message, place)
        content = message.get("content")
        if type(content) is list:
            parts = [
                each for number, part in enumerate(content) for each in _part(draft, part, f"{place}.content[{number}]")
            ]
        else:
            parts = plain(content, f"{place}.content")
        weigh(draft.say(role_of(message, place), parts, f"{place}.content"), message, place)
    draft.check()
    return draft


def role_of(message: dict[str, Any], place: str) -> str:
    """The canonical role of a message; raises Refusal for another."""
    role = message.get("role")
    if role not in ROLES:
        raise Refusal("ROLE_UNKNOWN", f"{place}.role", role)
    return str(role)


def weigh(said: dict[str, Any], message: dict[str, Any], place: str) -> None:
    """Carries `weight` over: 0 is an answer that is not learned, 1 is the default."""
    weight = message.get("weight")
    if weight is None or (weight == 1 and type(weight) is not bool):
        return
    if weight != 0 or type(weight) is bool or said["role"] != "assistant":
        raise Refusal("FIELD_TYPE", f"{place}.weight", weight)
    said["weight"] = 0


def plain(content: object, place: str) -> list[Part]:
    """The parts of a content that is one text; none where it is missing or empty."""
    if content is None or content == "":
        return []
    return [text_part(text_of(content, place))]


def _part(draft: Draft, part: object, place: str) -> list[Part]:
    part = object_of(part, place)
    kind = part.get("type")
    if kind == "text":
        return plain(part.get("text"), f"{place}.text")
    if kind in ("image_url", "image"):
        return [draft.picture(part.get(kind), f"{place}.{kind}")]
    raise Refusal("PART_UNKNOWN", f"{place}.type", kind)
