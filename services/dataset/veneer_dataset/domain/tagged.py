"""Conversations that list their pictures apart and mark their places with `<image>`.

ms-swift (`messages` and `images`), LLaMA-Factory's ShareGPT (`conversations` and `images`) and LLaVA
(`conversations` and `image`).
"""

from typing import Any

from veneer_dataset.domain.draft import Draft, Part, list_of, object_of, text_of, text_part
from veneer_dataset.domain.findings import Refusal
from veneer_dataset.domain.messages import plain, role_of, weigh
from veneer_dataset.domain.tags import TAG, interleaved

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def read_swift(row: dict[str, Any], default_prompt: str) -> Draft:
    """See dialects.read_draft; the default prompt is for pairs only."""
    draft = Draft()
    pictures = _Pictures(draft, row["images"], "$.images")
    for index, message in enumerate(list_of(row["messages"], "$.messages")):
        place = f"$.messages[{index}]"
        message = object_of(message, place)
        parts = pictures.placed(message.get("content"), f"{place}.content")
        weigh(draft.say(role_of(message, place), parts, f"{place}.content"), message, place)
    pictures.check()
    draft.check()
    return draft


def read_sharegpt(row: dict[str, Any], default_prompt: str) -> Draft:
    """See dialects.read_draft; the default prompt is for pairs only."""
    return _conversations(row, "images")


def read_llava(row: dict[str, Any], default_prompt: str) -> Draft:
    """See dialects.read_draft; the default prompt is for pairs only."""
    return _conversations(row, "image")


def _conversations(row: dict[str, Any], pictures_key: str) -> Draft:
    draft = Draft()
    pictures = _Pictures(draft, row.get(pictures_key), f"$.{pictures_key}")
    system = row.get("system")
    if system not in (None, ""):
        draft.say("system", [text_part(text_of(system, "$.system"))], "$.system")
    for index, turn in enumerate(list_of(row["conversations"], "$.conversations")):
        place = f"$.conversations[{index}]"
        turn = object_of(turn, place)
        speaker = turn.get("from")
        role = _SPEAKERS.get(speaker) if type(speaker) is str else None
        if role is None:
            raise Refusal("ROLE_UNKNOWN", f"{place}.from", speaker)
        parts = pictures.placed(turn.get("value"), f"{place}.value")
        weigh(draft.say(role, parts, f"{place}.value"), turn, place)
    pictures.check()
    draft.check()
    return draft


class _Pictures:
    """The pictures of a row that wait for their tags, and how many tags there were."""

    def __init__(self, draft: Draft, listed: object, json_path: str) -> None:
        self._json_path = json_path
        if listed is None:
            listed = []
        if type(listed) is list:
            parts = [draft.picture(each, f"{json_path}[{index}]") for index, each in enumerate(listed)]
        else:
            parts = [draft.picture(listed, json_path)]
        self._count, self._tags = len(parts), 0
        self._waiting = iter(parts)

    def placed(self, content: object, place: str) -> list[Part]:
        """The parts of a message's text, with the next pictures where its tags are."""
        if type(content) is not str or TAG not in content:
            return plain(content, place)
        self._tags += content.count(TAG)
        if self._tags > self._count:
            self.check()
        return interleaved(text_of(content, place), self._waiting)

    def check(self) -> None:
        """Checks that each picture has its tag."""
        if self._tags != self._count:
            more = "or more " if self._tags > self._count else ""
            raise Refusal("PICTURE_TAGS", self._json_path, f"{self._tags} {more}tags, {self._count} pictures")
