"""A PEFT folder that comes in from outside: header, then files; their digests are taken as they arrive."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from veneer_rpc.errors import Violation, invalid, violations
from veneer_rpc.names import AdapterName, ModelName
from veneer_rpc.threads import in_thread
from veneer_trainer.adapters.peft_folder import ALLOWED_FILES
from veneer_trainer.adapters.received_files import IncomingFolder
from veneer_trainer.api.requests import request_of
from veneer_trainer.domain.adapters import AdapterVersion, Imported
from veneer_trainer.domain.publishing import Publishing
from veneer_trainer.domain.spec import DEFAULT_MAX_PIXELS
from veneer_trainer.ports import ModelCatalog

_MIN_MAX_PIXELS = 1024
_MAX_DESCRIPTION_BYTES = 1 << 10


class AdapterImport:
    """Receives imports.

    Args:
        publishing: registers what was received.
        catalog: the bases.
        incoming: where to receive; on the file system of the adapters.
        max_bytes: most bytes of one folder.
    """

    def __init__(self, publishing: Publishing, catalog: ModelCatalog, incoming: Path, max_bytes: int) -> None:
        self._publishing = publishing
        self._catalog = catalog
        self._incoming = incoming
        self._max_bytes = max_bytes

    async def receive(self, requests: AsyncIterator[Any]) -> AdapterVersion:
        """Takes a stream and returns the version that it made; raises as the contract says."""
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("piece") != "header":
            raise invalid(Violation("piece", "HEADER_MISSING", "the first message must be the header"))
        header, asked = first.header, request_of(first.header)
        with violations() as found:
            adapter = found.attempt(AdapterName.parse, header.adapter, "header.adapter")
            model = found.attempt(ModelName.parse, header.model, "header.model")
            if (size := len(header.description.encode())) > _MAX_DESCRIPTION_BYTES:
                text = f"at most {_MAX_DESCRIPTION_BYTES} bytes, were {size}"
                found.add("header.description", "TOO_LONG", text)
        assert adapter is not None  # noqa: S101  # or `violations` has raised
        assert model is not None  # noqa: S101  # likewise
        max_pixels = self._max_pixels(model, header.max_pixels)
        folder = await in_thread(IncomingFolder, self._incoming, ALLOWED_FILES, self._max_bytes)
        try:
            async for request in requests:
                if request.WhichOneof("piece") != "file":
                    raise invalid(Violation("piece", "HEADER_TWICE", "only files may follow the header"))
                piece = request.file
                await in_thread(folder.write, piece.path, piece.size_bytes, piece.data)

            def register() -> AdapterVersion:
                imported = Imported(header.description, asked.actor)
                return self._publishing.bring_in(
                    asked, adapter, model, max_pixels, folder.check(), imported, version("veneer")
                )

            return await in_thread(register)
        finally:
            await in_thread(folder.abandon)

    def _max_pixels(self, model: ModelName, asked: int) -> int:
        """The bound that was trained with: within the base's, which the default gives way to."""
        most = self._catalog.get(model).max_pixels
        if asked and not _MIN_MAX_PIXELS <= asked <= most:
            text = f"must be {_MIN_MAX_PIXELS} to {most}, was {asked}"
            raise invalid(Violation("header.max_pixels", "OUT_OF_RANGE", text))
        return asked or min(DEFAULT_MAX_PIXELS, most)
