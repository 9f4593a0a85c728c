"""As many decoding children as there are cores, started when they are needed and replaced when they die."""

import os
import queue
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import structlog

from veneer_dataset.adapters.pictures.frames import Job, Outcome, receive, send
from veneer_rpc.errors import Unavailable

_T = TypeVar("_T")
_R = TypeVar("_R")
_log = structlog.get_logger(__name__)
_ATTEMPTS = 2  # a child may have died of something else than the picture


class DecoderDied(Exception):  # what happened, not a mistake of ours
    """Children died over one job."""


class PicturePool:
    """Runs jobs in children, from any thread; one that calls waits for its own job only.

    Args:
        size: how many children.
        memory_bytes: address space of a child.
        cpu_s: CPU time that one picture may take.
        wall_s: time after which a child that does not answer is killed.
    """

    def __init__(self, size: int, memory_bytes: int, cpu_s: int, wall_s: float) -> None:
        self._command = [
            sys.executable,
            "-m",
            "veneer_dataset.adapters.pictures.child",
            str(memory_bytes),
            str(cpu_s),
        ]
        self._wall_s = wall_s
        self._lock = threading.Lock()
        self._closed = False
        self._children: set[subprocess.Popen[bytes]] = set()
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)  # a place without a child yet
        self._threads = ThreadPoolExecutor(size, "pictures")
        self._ahead = 2 * size

    def run(self, job: Job, data: bytes) -> tuple[Outcome, bytes]:
        """Does one job.

        Raises:
            DecoderDied: the children that tried it died.
            Unavailable: the pool is closed.
        """
        for _ in range(_ATTEMPTS):
            child = self._idle.get()
            try:
                if child is None or child.poll() is not None:
                    child = self._start()
                return self._ask(child, job, data)
            except (EOFError, BrokenPipeError, TimeoutError) as error:
                if child is not None:
                    self._end(child)
                    _log.warning("decoder died", status=child.returncode, reason=type(error).__name__)
                child = None
            finally:
                self._idle.put(child)
        raise DecoderDied

    def map(self, work: Callable[[_T], _R], values: Iterable[_T]) -> Iterator[_R]:
        """Yields `work(value)` of each value in order, as many at once as there are children."""
        values = iter(values)
        running: list[Future[_R]] = [self._threads.submit(work, each) for each in islice(values, self._ahead)]
        try:
            while running:
                yield running.pop(0).result()
                running += [self._threads.submit(work, each) for each in islice(values, 1)]
        finally:
            for each in running:
                each.cancel()

    def close(self) -> None:
        """Ends all children."""
        with self._lock:
            self._closed = True
            children = list(self._children)
        for child in children:
            self._end(child)
        self._threads.shutdown(cancel_futures=True)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self._lock:
            if self._closed:
                raise Unavailable("STOPPING", "the service is stopping", retry_after_s=5)
            child = subprocess.Popen(  # noqa: S603  # our own module
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            self._children.add(child)
        return child

    def _ask(self, child: subprocess.Popen[bytes], job: Job, data: bytes) -> tuple[Outcome, bytes]:
        if child.stdin is None or child.stdout is None:
            raise AssertionError("children are started with pipes")
        send(child.stdin, job, data)
        if not select.select([child.stdout], [], [], self._wall_s)[0]:
            raise TimeoutError
        return receive(child.stdout, Outcome)

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was left in its buffer has nobody to read it
                    continue
        with self._lock:
            self._children.discard(child)
