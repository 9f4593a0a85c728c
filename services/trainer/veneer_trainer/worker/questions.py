"""What an evaluation asks: rows of a split as prompts with their expected answers."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from veneer.dataset.v1 import conversation_pb2, dataset_service_pb2, dataset_service_pb2_grpc
from veneer.trainer.v1 import evaluation_pb2
from veneer_trainer.worker.connections import bearer

_INLINE_BYTES = 3 << 20  # of pictures in a request; more are named by their digest
_ORDER = dataset_service_pb2.Shuffle(seed=0, epoch=0)  # as EvaluationSpec.max_samples says


@dataclass(frozen=True, slots=True)
class Question:
    """A row to ask."""

    index: int
    row_digest: str
    messages: tuple[conversation_pb2.Message, ...]
    picture_blobs: tuple[str, ...]
    prompt: str
    expected: str


async def read_questions(
    service: dataset_service_pb2_grpc.DatasetServiceAsyncStub,
    credential: Callable[[], str],
    spec: evaluation_pb2.EvaluationSpec,
    start: int,
    *,
    with_pictures: bool,
) -> AsyncIterator[Question]:
    """Yields the rows of an evaluation from the `start`-th on.

    Args:
        service: the dataset service.
        credential: returns the delegation to use now.
        spec: of the evaluation.
        start: rows to pass over.
        with_pictures: False leaves pictures' bytes out.

    Raises:
        RpcError: the service refuses, or is away.
    """
    limit = spec.max_samples - start if spec.max_samples else 0
    if limit < 0 or (spec.max_samples and not limit):
        return
    form = dataset_service_pb2.PICTURE_FORM_ORIGINAL if with_pictures else dataset_service_pb2.PICTURE_FORM_DIGEST
    request = dataset_service_pb2.ReadExamplesRequest(
        dataset_version=spec.dataset_version,
        split=spec.split,
        shuffle=_ORDER,
        offset=start,
        limit=limit,
        picture_form=form,
        batched=True,
    )
    example: dataset_service_pb2.Example | None = None
    more: dict[int, bytearray] = {}
    async for response in service.ReadExamples(request, metadata=bearer(credential())):
        if response.WhichOneof("item") == "picture_chunk":
            more.setdefault(response.picture_chunk.picture_index, bytearray()).extend(response.picture_chunk.data)
            continue
        for arrived in response.examples or (response.example,):
            if example is not None:
                yield _question(example, more, spec.prompt)
            example, more = arrived, {}
    if example is not None:
        yield _question(example, more, spec.prompt)


def _question(example: dataset_service_pb2.Example, more: dict[int, bytearray], prompt: str) -> Question:
    messages = list(example.messages)
    blobs, number, room_bytes = [], 0, _INLINE_BYTES
    for message in messages:
        for part in message.parts:
            if part.WhichOneof("content") != "picture":
                continue
            if part.picture.WhichOneof("source") == "data":
                data = part.picture.data + bytes(more.get(number, b""))
                blobs.append(hashlib.sha256(data).hexdigest())
                if len(data) <= room_bytes:
                    part.picture.data = data
                    room_bytes -= len(data)
                else:
                    part.picture.blob = blobs[-1]
            else:
                blobs.append(part.picture.blob)
            number += 1
    last = max(index for index, message in enumerate(messages) if message.role == conversation_pb2.ROLE_USER)
    asked, answers = messages[: last + 1], messages[last + 1 :]
    if prompt:
        pictures = [part for part in asked[last].parts if part.WhichOneof("content") == "picture"]
        asked[last] = conversation_pb2.Message(
            role=conversation_pb2.ROLE_USER, parts=[*pictures, conversation_pb2.Part(text=prompt)]
        )
    return Question(
        example.index, example.row_digest, tuple(asked), tuple(blobs), _text(asked[last]), "".join(map(_text, answers))
    )


def _text(message: conversation_pb2.Message) -> str:
    return "".join(part.text for part in message.parts if part.WhichOneof("content") == "text")
