"""Two replicas of a cluster: each is drained or killed under load and comes back; what could go on never fails."""

# ruff: noqa: ANN401  # the cluster's type stays in conftest

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from veneer_client import Client, Unavailable

pytestmark = [pytest.mark.e2e_long, pytest.mark.timeout(600)]
QUESTION = "Which digit is this? Answer with one digit from 0 to 9."
STREAMS = 8
MAX_TOKENS = 8


class Load:
    """Threads that ask on and on, every other one in streams, each answer held to the one before the faults."""

    def __init__(self, client: Client, pictures: list[Path]) -> None:
        self.client = client
        self.pictures = pictures
        self.right = [self._ask(picture)[0] for picture in pictures]
        self.by_replica: Counter[str] = Counter()
        self.cut: list[str] = []
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(index,)) for index in range(STREAMS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, picture: Path) -> tuple[list[int], str]:
        answer = self.client.generate(QUESTION, image=picture, max_tokens=MAX_TOKENS)
        return list(answer.token_ids), answer.served_by.replica

    def _ask_on(self, index: int) -> None:
        turn = index
        try:
            while not self._stop.is_set():
                turn += 1
                which = turn % len(self.pictures)
                if index % 2:
                    token_ids, replica = self._ask(self.pictures[which])
                else:
                    token_ids, replica = [], ""
                    try:
                        for piece in self.client.stream(
                            QUESTION, image=self.pictures[which], max_tokens=MAX_TOKENS
                        ):  # fmt: skip
                            token_ids += piece.token_ids
                            replica = piece.served_by.replica or replica
                    except Unavailable:
                        assert token_ids, "it had not begun: the other replica should have answered"
                        self.cut.append(replica)
                        continue
                assert token_ids == self.right[which]
                self.by_replica[replica] += 1
        except BaseException as error:
            self.failures.append(error)


def test_replicas_drain_die_and_join_under_load(pair: Any, folder: Path) -> None:
    pictures = [folder / "images" / "test" / f"{number:04}.png" for number in range(12)]
    with Load(pair.client, pictures) as load:

        def answers(replica: str, more: int = 8) -> None:
            goal = load.by_replica[replica] + more
            pair.until(lambda: load.by_replica[replica] >= goal or load.failures)
            assert not load.failures

        answers("replica-1")
        answers("replica-2")
        drained = pair.process("replica-1").pid
        os.kill(drained, signal.SIGTERM)
        pair.until(lambda: pair.process("replica-1").pid not in (0, drained))
        answers("replica-1")  # it is there again, and has its share
        assert load.cut == []
        killed = pair.process("replica-2").pid
        os.kill(killed, signal.SIGKILL)
        died_s = time.monotonic()
        answers("replica-1", 1)
        assert time.monotonic() - died_s < 2
        answers("replica-2")
    assert not load.failures
    assert set(load.cut) <= {"replica-2"}
    assert len(load.cut) <= STREAMS // 2
