"""Files over a stream: in pieces, one file after another."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence

from veneer_rpc.errors import DataLoss, OutOfRange
from veneer_rpc.threads import in_thread
from veneer_trainer.domain.files import StoredFile

CHUNK_BYTES = 1 << 20

Read = Callable[[str, int, int], bytes]
"""Given path, offset and size: bytes of a file."""


async def pieces(
    files: Sequence[StoredFile], read: Read, offset: int = 0
) -> AsyncIterator[tuple[StoredFile, int, bytes]]:
    """Yields (file, offset, bytes) from an offset in the first file; an empty file has one piece too.

    Raises:
        OutOfRange: the offset lies past the first file's end.
        DataLoss: a file that is read whole does not hash to its digest.
    """
    if files and not 0 <= offset <= files[0].size_bytes:
        raise OutOfRange("OFFSET_PAST_END", f"{files[0].path} has {files[0].size_bytes} bytes, asked was {offset}")
    for file in files:
        position, offset = offset, 0
        sha256 = hashlib.sha256()
        whole, last = position == 0, False
        while not last:
            data = await in_thread(read, file.path, position, CHUNK_BYTES)
            sha256.update(data)
            last = position + len(data) >= file.size_bytes
            cut = not data and not last
            if cut or (last and whole and sha256.hexdigest() != file.digest):
                raise DataLoss("FILE_DAMAGED", f"{file.path} is not what its digest says")
            yield file, position, data
            position += len(data)
