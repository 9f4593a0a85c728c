"""Answers to a whole split, kept in a file of JSON lines that a broken run goes on with.

Each line has the row, who answered and what came. Lines stand in the order in which answers came; `index` says which
row it is. Owns the file and what is left to ask; asking is the client's.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.dataset.v1.conversation_pb2 import Message, Part, Role
from veneer.dataset.v1.dataset_service_pb2 import Example
from veneer.inference.v1.inference_pb2 import FinishReason
from veneer.inference.v1.inference_service_pb2 import GenerateResponse
from veneer_client._errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    OtherAnswers,
    OutOfRange,
    ResourceExhausted,
)

Answer = Callable[[Sequence[Message]], Awaitable[GenerateResponse]]
"""Asks a prompt."""

_SYNCED = 16  # lines between two syncs to the disk: what a power cut may cost
_OF_THE_ROW = (InvalidArgument, FailedPrecondition, OutOfRange, DataLoss, ResourceExhausted)  # not of the cluster


@dataclass(slots=True)
class Batch:
    """What is asked of whom, and the file.

    Attributes:
        path: of the JSON lines.
        asked: the same in every line of one file: who answers, and the rows and settings.
        rows: of the split.
        done: indexes of the rows that have an answer in the file.
        failed: rows that got none in this run.
    """

    path: Path
    asked: dict[str, Any]
    rows: int
    done: set[int] = field(default_factory=set)
    failed: int = 0

    def resume(self) -> None:
        """Reads what the file has; cuts off a line that was written in part, and failures, which are asked again.

        Raises:
            OtherAnswers: it was made of another version, of other rows or with other settings.
        """
        if not self.path.exists():
            return
        kept, lines = bytearray(), self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                continue
            try:
                read = json.loads(line)
                asked, index, has_answer = read["asked"], read["index"], "answer" in read
            except (ValueError, KeyError, TypeError) as error:
                raise OtherAnswers(f"{self.path}:{number} is no line of a batch; name another file") from error
            for name, value in self.asked.items():
                if asked.get(name) != value:
                    text = f"{self.path} holds answers with {name} {asked.get(name)}, not {value}"
                    raise OtherAnswers(f"{text}: name another file, or remove it")
            if has_answer and index not in self.done:
                self.done.add(index)
                kept += line
        if len(kept) != sum(map(len, lines)):
            part = self.path.with_name(f"{self.path.name}.part")
            part.write_bytes(kept)
            part.replace(self.path)

    async def run(
        self,
        examples: AsyncIterator[Example],
        answer: Answer,
        in_flight: int,
        on_progress: Callable[["Batch"], None] = lambda batch: None,
    ) -> None:
        """Asks what is left, so many rows at once, and writes each answer as it comes.

        Args:
            examples: all rows, in order.
            answer: asks a prompt.
            in_flight: rows that are asked at once.
            on_progress: is told after each line.

        Raises:
            OtherAnswers: the alias moved and another version answered.
            StatusError: the cluster cannot answer any row.
        """
        free, asking = asyncio.Semaphore(in_flight), set[asyncio.Task[None]]()
        with self.path.open("ab") as file:
            written = 0

            def write(line: dict[str, Any]) -> None:
                nonlocal written
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                written += 1
                if written % _SYNCED == 0:
                    os.fsync(file.fileno())
                on_progress(self)

            async def ask(example: Example) -> None:
                try:
                    write(await self._line(example, answer))
                finally:
                    free.release()

            try:
                async for example in examples:
                    if example.index in self.done:
                        continue
                    await free.acquire()
                    asking.add(asyncio.create_task(ask(example)))
                    for task in [each for each in asking if each.done()]:
                        asking.discard(task)
                        task.result()
                await asyncio.gather(*asking)
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
            os.fsync(file.fileno())

    async def _line(self, example: Example, answer: Answer) -> dict[str, Any]:
        prompt, expected = question(example, self.asked["prompt"])
        line: dict[str, Any] = {"index": example.index, "row_digest": example.row_digest}
        line |= {"prompt": _text([prompt[-1]]), "expected": expected}
        try:
            response = await _patiently(answer, prompt)
        except _OF_THE_ROW as error:
            self.failed += 1
            return line | {"error": {"reason": error.reason, "message": error.message}, "asked": self.asked}
        served = response.served_by.adapter_version or response.served_by.model
        if served != self.asked["answered_by"]:
            raise OtherAnswers(f"{served} answered, not {self.asked['answered_by']}")
        self.done.add(example.index)
        line["answer"] = response.text
        line["finish_reason"] = FinishReason.Name(response.finish_reason).removeprefix("FINISH_REASON_").lower()
        line["answer_tokens"] = response.usage.answer_tokens
        return line | {"asked": self.asked}


def question(example: Example, prompt: str) -> tuple[list[Message], str]:
    """Returns what a row asks, up to its last user message, and the expected answer.

    Args:
        example: the row.
        prompt: replaces the text of that message, where it is given.
    """
    last = max(index for index, each in enumerate(example.messages) if each.role == Role.ROLE_USER)
    asked = list(example.messages[: last + 1])
    if prompt:
        pictures = [part for part in asked[last].parts if part.HasField("picture")]
        asked[last] = Message(role=Role.ROLE_USER, parts=[*pictures, Part(text=prompt)])
    return asked, _text(example.messages[last + 1 :])


def _text(messages: Sequence[Message]) -> str:
    return "".join(part.text for each in messages for part in each.parts)


async def _patiently(answer: Answer, prompt: Sequence[Message]) -> GenerateResponse:
    """Asks again for as long as the replicas are full: a batch is in no hurry."""
    while True:
        try:
            return await answer(prompt)
        except ResourceExhausted as error:
            if error.retry_after_s is None:  # a bound that this row will always pass
                raise
            await asyncio.sleep(error.retry_after_s)
