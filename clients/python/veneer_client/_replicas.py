"""Which replica answers. Owns the choice and the connections; not what is asked.

The same question (token, adapter, first picture) goes to the same replica, where caches hold it: the one with
the greatest hash, which moves no other key when a replica comes or goes (rendezvous hashing: Thaler and
Ravishankar, IEEE/ACM Transactions on Networking 6(1), 1998). A replica that has more than its share of this
client's open requests is passed over (consistent hashing with bounded loads: Mirrokni, Thorup and
Zadimoghaddam, arXiv:1608.01350). What has no key goes round.
"""

import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from veneer_client._calls import Connection

LOAD_BOUND = 1.25
REST_S = 2.0


class Replicas:
    """The replicas of the inference service, as this client sees them."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = {connection.address: connection for connection in connections}
        self._open_requests: Counter[str] = Counter()
        self._rests_until_s: dict[str, float] = {}
        self._turn = itertools.count()

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
        """Asks a replica that cannot be reached last for a while."""
        self._rests_until_s[connection.address] = time.monotonic() + REST_S

    async def close(self) -> None:
        """Ends all connections."""
        for connection in self._connections.values():
            await connection.close()
