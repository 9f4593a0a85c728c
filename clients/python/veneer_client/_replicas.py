"""Which replica answers. Owns the choice and the connections; not what is asked.

The same question (token, adapter, first picture) goes to the same replica, where caches hold it: the one with
the greatest hash, which moves no other key when a replica comes or goes (rendezvous hashing: Thaler and
Ravishankar, IEEE/ACM Transactions on Networking 6(1), 1998). A replica that has more than its share of this
client's open requests is passed over (consistent hashing with bounded loads: Mirrokni, Thorup and
Zadimoghaddam, arXiv:1608.01350). What has no key goes round.

An address `dns:///host:port` stands for every replica that its name resolves to (a headless service of
Kubernetes); it is looked up again now and then, so that replicas may come and go.
"""

import asyncio
import hashlib
import itertools
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from veneer_client._calls import Connection
from veneer_client._errors import Unavailable

LOAD_BOUND = 1.25
REST_S = 2.0
NAME_PREFIX = "dns:///"
LOOK_UP_S = 5.0
LOOK_UP_AFTER_FAILURE_S = 1.0


class Replicas:
    """The replicas of the inference service, as this client sees them.

    Args:
        addresses: of replicas, or names that stand for several.
        connect: makes the connection to an address; told the name that it was found under, else "".
    """

    def __init__(self, addresses: Sequence[str], connect: Callable[[str, str], Connection]) -> None:
        self._connect = connect
        self._names = [address for address in addresses if address.startswith(NAME_PREFIX)]
        self._fixed = [address for address in addresses if address not in self._names]
        self._found: dict[str, list[str]] = {name: [] for name in self._names}
        self._connections = {address: connect(address, "") for address in self._fixed}
        self._leaving: list[Connection] = []
        self._looked_up_s = float("-inf")
        self._looking_up = asyncio.Lock()
        self._open_requests: Counter[str] = Counter()
        self._rests_until_s: dict[str, float] = {}
        self._turn = itertools.count()

    async def look_up(self) -> None:
        """Finds who has come and who has gone, where it is time for that.

        Raises:
            Unavailable: no replica was ever found.
        """
        async with self._looking_up:
            if self._names and time.monotonic() - self._looked_up_s >= LOOK_UP_S:
                self._found |= {name: await resolve(name) or self._found[name] for name in self._names}
                self._looked_up_s = time.monotonic()
                await self._take(self._found)
        if not self._connections:
            raise Unavailable("NO_REPLICAS", f"nobody answers to {', '.join(self._names)}")

    async def _take(self, found: dict[str, list[str]]) -> None:
        under = {address: name for name, addresses in found.items() for address in addresses}
        for address in under.keys() - self._connections.keys():
            self._connections[address] = self._connect(address, host_of(under[address]))
        for address in self._connections.keys() - under.keys() - set(self._fixed):
            self._leaving.append(self._connections.pop(address))
        for connection in [each for each in self._leaving if not self._open_requests[each.address]]:
            self._leaving.remove(connection)
            await connection.close()

    def order(self, key: bytes) -> list[Connection]:
        """Returns all replicas, the one to ask first in front. An empty key takes turns."""
        addresses = sorted(self._connections)
        if key:
            addresses.sort(key=lambda address: hashlib.sha256(address.encode() + b"\0" + key).digest(), reverse=True)
        else:
            first = next(self._turn) % len(addresses)
            addresses = addresses[first:] + addresses[:first]
        bound = math.ceil(LOAD_BOUND * (self._open_requests.total() + 1) / len(addresses))
        now_s = time.monotonic()
        addresses.sort(
            key=lambda address: (
                self._rests_until_s.get(address, 0.0) > now_s,
                self._open_requests[address] >= bound,
            )
        )
        return [self._connections[address] for address in addresses]

    @contextmanager
    def asking(self, connection: Connection) -> Iterator[None]:
        """Counts a request as open while the block runs."""
        self._open_requests[connection.address] += 1
        try:
            yield
        finally:
            self._open_requests[connection.address] -= 1

    def failed(self, connection: Connection) -> None:
        """Asks a replica that cannot be reached last for a while, and soon looks who has come in its place."""
        now_s = time.monotonic()
        self._rests_until_s[connection.address] = now_s + REST_S
        self._looked_up_s = min(self._looked_up_s, now_s - LOOK_UP_S + LOOK_UP_AFTER_FAILURE_S)

    async def close(self) -> None:
        """Ends all connections."""
        for connection in (*self._connections.values(), *self._leaving):
            await connection.close()


def host_of(address: str) -> str:
    """The host in host:port, with or without the prefix of a name."""
    return address.removeprefix(NAME_PREFIX).rpartition(":")[0].strip("[]")


async def resolve(name: str) -> list[str]:
    """The addresses that a name stands for now; none where it cannot be looked up."""
    host, port = host_of(name), name.rpartition(":")[2]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError:
        return []
    hosts = {str(each[4][0]) for each in found}
    return sorted(f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts)
