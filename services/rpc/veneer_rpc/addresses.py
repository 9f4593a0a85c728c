"""Addresses to listen on or to connect to, and which of them no other machine can reach."""

import ipaddress


def is_local(address: str) -> bool:
    """Says whether an address is a Unix socket or on the loopback interface."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check(address: str) -> str | None:
    """Says what is wrong with an address to listen on; None if nothing is."""
    if address.startswith(("unix:", "unix-abstract:")):
        return None if address.partition(":")[2] else f"has no path after the colon, was {address!r}"
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        return f"must be host:port with a port of 0 to 65535, or unix:/path, was {address!r}"
    return None
