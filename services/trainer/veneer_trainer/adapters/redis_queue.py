"""The queue in Redis: a stream with a consumer group for each lane, and fair turns between tenants.

An entry is the work's uid. It waits undelivered; `take` delivers it to a worker's consumer; it is
acknowledged and deleted once the database has given out the lease, so pending entries are only those in
between. Leases are not kept here: Redis measures idle time and expiry by the wall clock of its machine, and a
lost Redis would end every lease at once. No stream is ever trimmed. Commands and scripts are those of Redis 7.

Keys, under one hash tag: `lanes`, a set; `places`, uid to entry and lane; `spent`, tenant to virtual time;
`now`, virtual time; `lane:…`, the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from veneer_rpc.errors import Unavailable
from veneer_trainer.domain.fair_share import Lane, turn
from veneer_trainer.ports import QueueContents

_GROUP = "workers"
_PREFIX = "{veneer}:"
_LANES, _PLACES, _SPENT, _NOW, _STREAM = (_PREFIX + name for name in ("lanes", "places", "spent", "now", "lane:"))

_ADD = """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 0 end
redis.pcall('XGROUP', 'CREATE', KEYS[3], ARGV[3], '0', 'MKSTREAM')
local entry = redis.call('XADD', KEYS[3], '*', 'uid', ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], entry .. ' ' .. ARGV[2])
redis.call('SADD', KEYS[2], ARGV[2])
return 1
"""

# Streams in the order of turns; the first that has an entry is charged and gives it.
_TAKE = """
for i = 3, #KEYS do
  local found = redis.pcall('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', 1, 'STREAMS', KEYS[i], '>')
  if found and not found.err then
    local tenant, cost = ARGV[i * 2 - 3], tonumber(ARGV[i * 2 - 2])
    local spent, now = redis.call('HGET', KEYS[1], tenant), redis.call('GET', KEYS[2])
    local start = math.max(tonumber(spent or 0), tonumber(now or 0))
    redis.call('SET', KEYS[2], tostring(start))
    redis.call('HSET', KEYS[1], tenant, tostring(start + cost))
    return found[1][2][1][2][2]
  end
end
return false
"""

_PUT_BACK = """
local place = redis.call('HGET', KEYS[1], ARGV[1])
if not place then return 0 end
local entry, lane = place:match('^(%S+) (.*)$')
local stream = ARGV[2] .. lane
if redis.call('XACK', stream, ARGV[3], entry) == 0 then return 0 end
redis.call('XDEL', stream, entry)
entry = redis.call('XADD', stream, '*', 'uid', ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], entry .. ' ' .. lane)
return 1
"""

_FORGET = """
local place = redis.call('HGET', KEYS[1], ARGV[1])
if not place then return 0 end
local entry, lane = place:match('^(%S+) (.*)$')
local stream = ARGV[2] .. lane
redis.pcall('XACK', stream, ARGV[3], entry)
redis.call('XDEL', stream, entry)
redis.call('HDEL', KEYS[1], ARGV[1])
if redis.call('XLEN', stream) == 0 then
  redis.call('DEL', stream)
  redis.call('SREM', KEYS[2], lane)
end
return 1
"""


@contextmanager
def _reached() -> Iterator[None]:
    """Turns an error of Redis into the one that the port promises."""
    try:
        yield
    except RedisError as error:
        raise Unavailable("QUEUE_UNAVAILABLE", "the queue cannot be reached", retry_after_s=1.0) from error


class RedisQueue:
    """The WorkQueue of one Redis database; see `ports.WorkQueue`.

    Args:
        url: `redis://host:port/database`.
        weights: by tenant, its share of turns; 1 for those not named.
        timeout_s: longest wait for a connection or an answer.
    """

    def __init__(self, url: str, weights: Mapping[str, float], timeout_s: float = 2.0) -> None:
        self._weights = weights
        self._redis: Any = Redis.from_url(  # its stubs mix the sync client's answers with the async one's
            url,
            decode_responses=True,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),
        )
        scripts = (_ADD, _TAKE, _PUT_BACK, _FORGET)
        self._add, self._take, self._put_back, self._forget = map(self._redis.register_script, scripts)

    @_reached()
    def add(self, uid: str, lane: Lane) -> bool:
        """See WorkQueue."""
        keys = [_PLACES, _LANES, f"{_STREAM}{lane}"]
        return bool(self._add(keys, [uid, str(lane), _GROUP]))

    @_reached()
    def take(self, worker: str, can_run: Callable[[Lane], bool]) -> str | None:
        """See WorkQueue."""
        with self._redis.pipeline() as pipe:
            pipe.smembers(_LANES).hgetall(_SPENT).get(_NOW)
            texts, spent, now = pipe.execute()
            lanes = [lane for lane in map(Lane.parse, texts) if can_run(lane)]
            for lane in lanes:
                pipe.xrange(f"{_STREAM}{lane}", count=1)
            heads = [entries[0][0] if entries else "" for entries in pipe.execute()]
        virtual = {tenant: float(value) for tenant, value in spent.items()}
        waits = sorted(
            (turn(lane, virtual, float(now or 0), head), lane) for lane, head in zip(lanes, heads, strict=True)
        )
        keys, arguments = [_SPENT, _NOW], [_GROUP, worker]
        for _, lane in waits:
            keys.append(f"{_STREAM}{lane}")
            arguments += [lane.tenant, repr(1 / self._weights.get(lane.tenant, 1.0))]
        uid: str | None = self._take(keys, arguments) if waits else None
        return uid

    @_reached()
    def lanes(self) -> frozenset[Lane]:
        """See WorkQueue."""
        return frozenset(map(Lane.parse, self._redis.smembers(_LANES)))

    @_reached()
    def put_back(self, uid: str) -> None:
        """See WorkQueue."""
        self._put_back([_PLACES], [uid, _STREAM, _GROUP])

    @_reached()
    def forget(self, uid: str) -> None:
        """See WorkQueue."""
        self._forget([_PLACES, _LANES], [uid, _STREAM, _GROUP])

    @_reached()
    def contents(self) -> QueueContents:
        """See WorkQueue. Read from the streams, so that a place without an entry counts as nothing."""
        waiting, taken = set[str](), set[str]()
        for lane in self._redis.smembers(_LANES):
            stream = f"{_STREAM}{lane}"
            with self._redis.pipeline() as pipe:
                pipe.xrange(stream).xpending_range(stream, _GROUP, "-", "+", 1_000_000)
                entries, pending = pipe.execute(raise_on_error=False)
            if isinstance(entries, RedisError) or isinstance(pending, RedisError):
                continue  # the lane has gone meanwhile
            ids = {each["message_id"] for each in pending}
            for entry, fields in entries:
                (taken if entry in ids else waiting).add(fields["uid"])
        return QueueContents(frozenset(waiting), frozenset(taken))

    def close(self) -> None:
        """Closes the connections."""
        self._redis.close()
