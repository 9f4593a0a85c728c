"""What an exported model is asked: rows of the adapter's own data, or drawings where those are not there."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from veneer.trainer.v1 import export_pb2
from veneer_processing import Conversation, Encoded, Message, Processor, Text, open_picture
from veneer_trainer.worker.loop.dataset import Dataset
from veneer_trainer.worker.loop.link import Link
from veneer_trainer.worker.messages import ExportTask

_DRAWN_TOKENS = 24  # of an answer that nothing is expected of
_LONGEST_ANSWER = 512
_ORDER = (0, 0)  # seed and epoch: the order of an evaluation's rows


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A prompt.

    Attributes:
        encoded: as the model reads it.
        expected: the row's answer; None for a drawing.
        max_tokens: of an answer.
    """

    encoded: Encoded
    expected: str | None
    max_tokens: int


def prompts(link: Link, task: ExportTask, export: export_pb2.Export, processor: Processor) -> list[Asked]:
    """Returns at most as many prompts as the task says; raises Refused where rows cannot be read."""
    if not export.dataset_version:
        return [*drawn(task.prompts, processor)]
    dataset = Dataset(
        task.dataset,
        Path(task.certificates_file) if task.certificates_file else None,
        lambda: link.delegation,
        export.dataset_version,
        export.model,
        processor.contract.max_pixels,
        task.dataset_patience_s,
    )
    asked = []
    for _, conversation in dataset.read(export.spec.check_split, _ORDER):
        last = max(index for index, message in enumerate(conversation.messages) if message.role == "user")
        answer = Message("assistant", conversation.messages[last + 1].parts)
        expected = "".join(message.text for message in conversation.messages[last + 1 :])
        prompt = Conversation(conversation.messages[: last + 1])
        (count,) = processor.count([Conversation((*prompt.messages, answer))])
        most = min(count.supervised + count.supervised // 4 + 1, _LONGEST_ANSWER)
        asked.append(Asked(processor.encode_prompt(prompt), expected, most))
        if len(asked) == task.prompts:
            break
    dataset.close()
    return asked


def drawn(count: int, processor: Processor) -> Iterator[Asked]:
    """Yields prompts about drawn numbers, of which no answer is expected."""
    for number in range(count):
        image = Image.new("RGB", (160, 96), "white")
        text = str(number * 7919 % 100_000)
        ImageDraw.Draw(image).text((80, 48), text, "black", ImageFont.load_default(32), anchor="mm")
        file = io.BytesIO()
        image.save(file, "PNG")
        picture = open_picture(file.getvalue())
        prompt = Conversation((Message("user", (picture, Text("What is written here?"))),))
        yield Asked(processor.encode_prompt(prompt), None, _DRAWN_TOKENS)
