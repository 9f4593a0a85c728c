"""Channels of a worker: for threads too, and with a credential a call that may change."""

from __future__ import annotations

from pathlib import Path

import grpc

from veneer_rpc.addresses import is_local
from veneer_rpc.channel import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, connection_options

Metadata = tuple[tuple[str, str], ...]


def bearer(credential: str) -> Metadata:
    """Returns the metadata of a call under a token or delegation."""
    return (("authorization", f"Bearer {credential}"),)


def open_channel(address: str, certificates_file: Path | None) -> grpc.aio.Channel:
    """Opens a channel for an event loop; the caller closes it."""
    if certificates_file is None:
        return grpc.aio.insecure_channel(address, _options(address))
    credentials = grpc.ssl_channel_credentials(certificates_file.read_bytes())
    return grpc.aio.secure_channel(address, credentials, _options(address))


def open_sync_channel(address: str, certificates_file: Path | None) -> grpc.Channel:
    """Opens a channel for threads; the caller closes it."""
    if certificates_file is None:
        return grpc.insecure_channel(address, _options(address))
    credentials = grpc.ssl_channel_credentials(certificates_file.read_bytes())
    return grpc.secure_channel(address, credentials, _options(address))


def _options(address: str) -> list[tuple[str, int]]:
    options = connection_options(KEEPALIVE_S, KEEPALIVE_TIMEOUT_S)
    return [*options, ("grpc.enable_http_proxy", 0)] if is_local(address) else options
