"""`GET /metrics` on loopback, where Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from prometheus_client import CollectorRegistry, start_http_server

from veneer_rpc.server import BindError

HOST = "127.0.0.1"
_log = structlog.get_logger(__name__)


@contextmanager
def metrics_page(registry: CollectorRegistry, port: int | None) -> Iterator[None]:
    """Serves a registry from a thread while the block runs; port 0 takes a free one, None serves nothing.

    Raises:
        BindError: the port cannot be listened on.
    """
    if port is None:
        yield
        return
    try:
        server, thread = start_http_server(port, HOST, registry)
    except OSError as error:
        raise BindError(f"metrics: cannot listen on {HOST}:{port}: {error.strerror}") from error
    _log.info("metrics", address=f"http://{HOST}:{server.server_port}/metrics")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
