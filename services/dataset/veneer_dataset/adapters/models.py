"""Models' processors, made of the small files that the trainer hands out.

Asynchronous: it speaks to another service, at the edge. What was fetched stays on disk, so that rows can be
read while the trainer is away.
"""

import asyncio
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import msgspec

from veneer.trainer.v1 import model_service_pb2
from veneer.trainer.v1.model_pb2 import Model
from veneer.trainer.v1.model_service_pb2_grpc import ModelServiceStub
from veneer_dataset.domain.tokens import Counting
from veneer_processing import DEFAULT_MAX_PIXELS, ContractMismatchError, PixelBounds, ProcessingError, Processor
from veneer_rpc import status
from veneer_rpc.errors import DataLoss, FailedPrecondition, Unavailable, Violation, invalid
from veneer_rpc.names import ModelName
from veneer_rpc.threads import in_thread

if TYPE_CHECKING:  # the generated code has no such name
    from veneer.trainer.v1.model_service_pb2_grpc import ModelServiceAsyncStub

MIN_MAX_PIXELS = 1024

_MAX_FILES_BYTES = 256 * 1024 * 1024
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")


class _Known(msgspec.Struct):
    """What is kept of a model beside its files."""

    digest: str
    context_length: int
    folder: str


class TrainerModels:
    """Processors by model, from the trainer's ModelService.

    Args:
        channel: to the trainer, None where there is none.
        folder: keeps models' files.
    """

    def __init__(self, channel: grpc.aio.Channel | None, folder: Path) -> None:
        self._models: ModelServiceAsyncStub | None = ModelServiceStub(channel) if channel else None
        self._folder = folder
        self._lock = asyncio.Lock()
        self._processors: dict[str, Processor] = {}

    async def counting(self, name: ModelName, max_pixels: int) -> Counting:
        """What counts tokens and resizes pictures for a model.

        Args:
            name: the model's.
            max_pixels: bound on a picture's area; 0 for the default, the model's own where that is lower.

        Raises:
            NotFound: the trainer has no such model.
            InvalidArgument: a bound that the model does not take.
            FailedPrecondition: the model's files are of no use.
            Unavailable: the trainer is away, and the model was never fetched.
        """
        async with self._lock:
            known = await self._known(name)
            processor = self._processors.get(known.folder)
            if processor is None:
                try:
                    processor = await in_thread(Processor.load, self._folder / known.folder, known.digest)
                except ProcessingError as error:
                    raise FailedPrecondition("MODEL_UNUSABLE", f"{name}: {error}"[:500]) from error
                self._processors[known.folder] = processor
        own = processor.model_bounds
        most = max_pixels or min(own.max_pixels, DEFAULT_MAX_PIXELS)
        if not most >= MIN_MAX_PIXELS:
            raise _out_of_range(own, max_pixels)
        bounds = PixelBounds(min(own.min_pixels, most), most)
        wanted = replace(processor.contract, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
        try:
            bounded = processor.under(wanted)
        except ContractMismatchError:
            raise _out_of_range(own, max_pixels) from None
        return Counting(str(name), bounded.contract.digest, bounded, known.context_length)

    async def _known(self, name: ModelName) -> _Known:
        note = self._folder / f"{name.model}.json"
        try:
            if self._models is None:
                raise Unavailable("NO_TRAINER", "this server was given no trainer to ask for models")
            try:
                model = await self._models.GetModel(model_service_pb2.GetModelRequest(name=str(name)))
                return await self._fetched(self._models, model, note)
            except grpc.RpcError as error:
                raise status.from_rpc_error(error) from error
        except Unavailable:
            if not note.exists():
                raise
            return msgspec.json.decode(note.read_bytes(), type=_Known)

    async def _fetched(self, models: "ModelServiceAsyncStub", model: Model, note: Path) -> _Known:
        content = "".join(sorted(f"{file.path}:{file.digest}\n" for file in model.files))
        folder = hashlib.sha256(f"{model.digest}\n{content}".encode()).hexdigest()
        known = _Known(model.digest, model.context_length, folder)
        if not (self._folder / folder).exists():
            wanted = [file for file in model.files if _FILE_NAME.fullmatch(file.path)]
            if sum(file.size_bytes for file in wanted) > _MAX_FILES_BYTES:
                raise FailedPrecondition("MODEL_UNUSABLE", f"{model.name}: files over {_MAX_FILES_BYTES} bytes")
            request = model_service_pb2.DownloadModelFilesRequest(name=model.name, paths=[file.path for file in wanted])
            data: dict[str, bytearray] = {file.path: bytearray() for file in wanted}
            async for piece in models.DownloadModelFiles(request):
                data[piece.file.path] += piece.data
            for file in wanted:
                if hashlib.sha256(data[file.path]).hexdigest() != file.digest:
                    raise DataLoss("MODEL_DAMAGED", f"{model.name}: {file.path} does not hash to its digest")
            await in_thread(_keep, self._folder / folder, data)
        await in_thread(_replace, note, msgspec.json.encode(known))
        return known


def _keep(folder: Path, data: dict[str, bytearray]) -> None:
    new = folder.with_suffix(".new")
    new.mkdir(parents=True, exist_ok=True)
    for name, content in data.items():
        (new / name).write_bytes(content)
    new.rename(folder)


def _replace(file: Path, content: bytes) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(content)
    new.replace(file)


def _out_of_range(own: PixelBounds, max_pixels: int) -> Exception:
    return invalid(
        Violation("max_pixels", "OUT_OF_RANGE", f"must be {MIN_MAX_PIXELS} to {own.max_pixels}, was {max_pixels}")
    )
