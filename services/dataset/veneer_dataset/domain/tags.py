"""`<image>` tags: where pictures stand in a text of the dialects that list them apart."""

import re
from collections.abc import Iterator

from veneer_dataset.domain.draft import Part, text_part

TAG = "<image>"
_TAG = re.compile(r"\n?<image>\n?")  # a line break beside a tag only sets it apart


def interleaved(text: str, pictures: Iterator[Part]) -> list[Part]:
    """Parts of a text whose tags are replaced, in their order, by as many pictures."""
    first, *rest = _TAG.split(text)
    parts = [text_part(first)] if first else []
    for following in rest:
        parts.append(next(pictures))
        if following:
            parts.append(text_part(following))
    return parts
