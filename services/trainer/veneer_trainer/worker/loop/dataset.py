"""Rows from the dataset service, read on through its absences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np

from veneer.dataset.v1 import conversation_pb2, dataset_pb2, dataset_service_pb2, dataset_service_pb2_grpc
from veneer_processing import Conversation, Message, Part, Picture, Role, Text
from veneer_rpc import errors
from veneer_rpc.status import from_rpc_error
from veneer_trainer.worker.connections import bearer, open_sync_channel
from veneer_trainer.worker.refusal import Refused

_AGAIN_S, _LONGEST_AGAIN_S = 0.2, 5.0
_CALL_S = 60.0
_PASSING = (
    errors.Unavailable,
    errors.DeadlineExceeded,
    errors.ResourceExhausted,
    errors.Internal,
    errors.Cancelled,
    errors.Unauthenticated,  # until the worker has a new delegation
)
_ROLES: dict[int, Role] = {
    conversation_pb2.ROLE_SYSTEM: "system",
    conversation_pb2.ROLE_USER: "user",
    conversation_pb2.ROLE_ASSISTANT: "assistant",
}


class Dataset:
    """One dataset version, for one base under one pixel bound.

    Args:
        address: of the service.
        certificates_file: PEM of whom to trust there; None on this machine.
        credential: returns the delegation to use now.
        version: `datasets/{dataset}/versions/{sha256}`.
        model: `models/{model}`.
        max_pixels: bound on a picture's area.
        patience_s: how long the service may be away.
    """

    def __init__(
        self,
        address: str,
        certificates_file: Path | None,
        credential: Callable[[], str],
        version: str,
        model: str,
        max_pixels: int,
        patience_s: float,
    ) -> None:
        self._channel = open_sync_channel(address, certificates_file)
        self._service = dataset_service_pb2_grpc.DatasetServiceStub(self._channel)
        self._credential = credential
        self._version = version
        self._model = model
        self._max_pixels = max_pixels
        self._patience_s = patience_s

    def close(self) -> None:
        """Ends every call."""
        self._channel.close()

    def facts(self) -> dataset_pb2.DatasetVersion:
        """Returns the version's splits and report; raises Refused."""
        request = dataset_service_pb2.GetDatasetVersionRequest(name=self._version)
        patience = _Patience(self._patience_s)
        while True:
            try:
                return self._service.GetDatasetVersion(request, timeout=_CALL_S, metadata=self._metadata())
            except grpc.RpcError as error:
                patience.bear(error)

    def read(
        self, split: str, shuffle: tuple[int, int] | None = None, offset: int = 0
    ) -> Iterator[tuple[str, Conversation]]:
        """Yields (row digest, conversation) from an offset in stored order, or in that of a (seed, epoch).

        Raises:
            Refused: the service refuses, or was away for too long.
        """
        patience = _Patience(self._patience_s)
        while True:
            try:
                for row in self._stream(split, shuffle, offset):
                    yield row
                    offset += 1
                    patience = _Patience(self._patience_s)
                return
            except grpc.RpcError as error:
                patience.bear(error)

    def _stream(self, split: str, shuffle: tuple[int, int] | None, offset: int) -> Iterator[tuple[str, Conversation]]:
        request = dataset_service_pb2.ReadExamplesRequest(
            dataset_version=self._version,
            split=split,
            offset=offset,
            picture_form=dataset_service_pb2.PICTURE_FORM_RESIZED,
            model=self._model,
            max_pixels=self._max_pixels,
            batched=True,
        )
        if shuffle is not None:
            request.shuffle.seed, request.shuffle.epoch = shuffle
        example: dataset_service_pb2.Example | None = None
        more: dict[int, bytearray] = {}
        call = self._service.ReadExamples(request, metadata=self._metadata())
        try:
            for response in call:
                if response.WhichOneof("item") == "picture_chunk":
                    chunk = response.picture_chunk
                    more.setdefault(chunk.picture_index, bytearray()).extend(chunk.data)
                    continue
                for arrived in response.examples or (response.example,):
                    if example is not None:
                        yield example.row_digest, _conversation(example, more)
                    example, more = arrived, {}
            if example is not None:
                yield example.row_digest, _conversation(example, more)
        finally:
            call.cancel()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return bearer(self._credential())


class _Patience:
    """Waits out failures that may pass, longer each time, until it has had enough."""

    def __init__(self, limit_s: float) -> None:
        self._until_s = time.monotonic() + limit_s
        self._limit_s = limit_s
        self._again_s = _AGAIN_S

    def bear(self, error: grpc.RpcError) -> None:
        """Waits; raises Refused where waiting does not help, or has not."""
        problem = from_rpc_error(error)
        if not isinstance(problem, _PASSING):
            raise Refused(problem.reason, f"the dataset service refuses: {problem.message}") from error
        if time.monotonic() > self._until_s:
            text = f"the dataset service has not answered for {self._limit_s:g} s: {problem.message}"
            raise Refused("DATASET_UNAVAILABLE", text, transient=True) from error
        time.sleep(min(problem.retry_after_s or self._again_s, _LONGEST_AGAIN_S))
        self._again_s = min(2 * self._again_s, _LONGEST_AGAIN_S)


def _conversation(example: dataset_service_pb2.Example, more: dict[int, bytearray]) -> Conversation:
    messages = []
    number = 0
    for message in example.messages:
        parts: list[Part] = []
        for part in message.parts:
            if part.WhichOneof("content") == "text":
                parts.append(Text(part.text))
                continue
            resized = part.picture.resized
            rgb = np.frombuffer(resized.rgb + bytes(more.get(number, b"")), np.uint8)
            parts.append(Picture.resized(resized.blob, rgb.reshape(resized.height, resized.width, 3)))
            number += 1
        messages.append(Message(_ROLES[message.role], tuple(parts), supervised=not message.unsupervised))
    return Conversation(tuple(messages))
