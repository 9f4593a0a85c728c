"""Pictures in a page that stands alone: their bytes are in it."""

import base64
import struct
import zlib

from veneer.dataset.v1.conversation_pb2 import Picture
from veneer.dataset.v1.dataset_service_pb2 import Example

THUMBNAIL_PIXELS = 160 * 160


def thumbnails(row: Example) -> list[str]:
    """The HTML elements of a row's pictures, in their order."""
    return [image(part.picture) for message in row.messages for part in message.parts if part.HasField("picture")]


def image(picture: Picture) -> str:
    """A picture as an HTML element that holds its bytes."""
    if picture.HasField("resized"):
        data = png(picture.resized.width, picture.resized.height, picture.resized.rgb)
    else:
        data = picture.data
    kind = _kind(data)
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _kind(data: bytes) -> str:
    if data.startswith(b"\xff\xd8"):
        return "jpeg"
    return "webp" if data.startswith(b"RIFF") else "png"


def png(width: int, height: int, rgb: bytes) -> bytes:
    """RGB bytes, rows from the top, as a PNG file (ISO/IEC 15948): the client needs no picture library for that."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + rgb[3 * width * y : 3 * width * (y + 1)] for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
