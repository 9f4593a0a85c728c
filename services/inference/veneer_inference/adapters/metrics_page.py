"""`GET /metrics` over HTTP on loopback: just enough of HTTP for a scrape."""

import asyncio
from collections.abc import Callable

from veneer_inference.metrics import CONTENT_TYPE
from veneer_rpc.server import BindError
from veneer_rpc.threads import in_thread

HOST = "127.0.0.1"
_REQUEST_BYTES = 8192
_REQUEST_S = 5.0


class MetricsPage:
    """Serves one page.

    Args:
        snapshot: is called on the event loop; what it returns makes the page, in a thread.
    """

    def __init__(self, snapshot: Callable[[], Callable[[], bytes]]) -> None:
        self._snapshot = snapshot
        self._server: asyncio.Server | None = None

    async def start(self, port: int) -> str:
        """Listens; returns the page's address. Port 0 takes a free one.

        Raises:
            BindError: the port cannot be listened on.
        """
        try:
            self._server = await asyncio.start_server(self._answer, HOST, port, limit=_REQUEST_BYTES)
        except OSError as error:
            raise BindError(f"metrics: cannot listen on {HOST}:{port}: {error.strerror}") from error
        return f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}/metrics"

    async def close(self) -> None:
        """Listens no more."""
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._response(head.partition(b"\r\n")[0]))
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever does not ask in time, in bounds or to the end gets no answer
        finally:
            writer.close()

    async def _response(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if path != b"/metrics":
            return _http("404 Not Found", b"the page is /metrics\n", "text/plain")
        if method != b"GET":
            return _http("405 Method Not Allowed", b"the page is read with GET\n", "text/plain")
        return _http("200 OK", await in_thread(self._snapshot()), CONTENT_TYPE)


def _http(status: str, body: bytes, content_type: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return f"{head}\r\n".encode() + body
