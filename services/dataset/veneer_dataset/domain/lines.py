"""Lines of a row file: found in its bytes, counted and bounded; what they say is not read here."""

from collections.abc import Iterable, Iterator

from veneer_rpc.errors import ResourceExhausted

MAX_LINE_BYTES = 32 * 1024 * 1024
MAX_BLANK_LINES = 1_000_000


def row_lines(pieces: Iterable[bytes], path: str) -> Iterator[tuple[int, bytes]]:
    """Yields number (from 1) and bytes of each line that is not blank, without its line end.

    Args:
        pieces: the file, cut anywhere.
        path: the file's name, for errors.

    Raises:
        ResourceExhausted: a line over MAX_LINE_BYTES, or more than MAX_BLANK_LINES blank ones.
    """
    number = blank = 0
    for line in _lines(pieces, path):
        number += 1
        if line and not line.isspace():
            yield number, line.rstrip(b"\r")
            continue
        blank += 1
        if blank > MAX_BLANK_LINES:
            raise ResourceExhausted(
                "TOO_MANY_BLANK_LINES", f"{path}:{number}: more than {MAX_BLANK_LINES} blank lines, the limit"
            )


def _lines(pieces: Iterable[bytes], path: str) -> Iterator[bytes]:
    started: list[bytes] = []  # of the line that goes on in the next piece
    size_bytes = lines = 0
    for piece in pieces:
        first, *rest = piece.split(b"\n")
        started.append(first)
        size_bytes += len(first)
        if size_bytes > MAX_LINE_BYTES:
            raise ResourceExhausted(
                "LINE_TOO_LONG", f"{path}:{lines + 1}: a line over {MAX_LINE_BYTES} bytes, the limit"
            )
        if rest:
            lines += len(rest)
            yield b"".join(started)
            yield from rest[:-1]
            started, size_bytes = [rest[-1]], len(rest[-1])
    if size_bytes:
        yield b"".join(started)
