# ruff: noqa: ANN401  # the kit is the conftest's
"""A client over real replicas that join, drain and die while it asks."""

import asyncio
import socket
import time
from collections import Counter
from typing import Any

import pytest

from veneer_client import AsyncClient, Unavailable

QUESTION = "Which digit is this?"
MAX_TOKENS = 6


class Load:
    """Asks on and on with several pictures, half of it in streams, and holds each answer to the right one."""

    def __init__(self, client: AsyncClient, pictures: list[bytes]) -> None:
        self.client = client
        self.pictures = pictures
        self.right: list[list[int]] = []
        self.by_replica: Counter[str] = Counter()
        self.cut: list[str] = []  # streams that had begun on a replica that was lost
        self.stop = asyncio.Event()

    async def prepare(self) -> None:
        for picture in self.pictures:
            answer = await self.client.generate(QUESTION, image=picture, adapter="digits", max_tokens=MAX_TOKENS)
            self.right.append(list(answer.token_ids))

    async def ask_on(self, index: int) -> None:
        turn = index
        while not self.stop.is_set():
            turn += 1
            which = turn % len(self.pictures)
            asked: dict[str, Any] = {
                "image": self.pictures[which], "adapter": "digits", "max_tokens": MAX_TOKENS, "timeout_s": 30.0,
            }  # fmt: skip
            if index % 2:
                answer = await self.client.generate(QUESTION, **asked)
                token_ids, replica = list(answer.token_ids), answer.served_by.replica
            else:
                token_ids, replica = [], ""
                try:
                    async for piece in self.client.stream(QUESTION, **asked):
                        token_ids += piece.token_ids
                        replica = piece.served_by.replica or replica
                except Unavailable:
                    assert token_ids, "it had not begun: another replica should have answered"
                    self.cut.append(replica)
                    continue
            assert token_ids == self.right[which]
            self.by_replica[replica] += 1

    def answered(self, replica: str, more: int) -> Any:
        goal = self.by_replica[replica] + more
        return lambda: self.by_replica[replica] >= goal


async def test_replicas_join_drain_and_die_under_load(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.train(1)
    kit.registry.promote("acme", "digits", production=1, preload=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second, third = (kit.process(f"r{number}", f"127.0.0.{number}:{port}") for number in (1, 2, 3))
    there = [first.bind, second.bind]

    async def resolve(name: str) -> list[str]:
        return list(there)

    monkeypatch.setattr("veneer_client._replicas.resolve", resolve)
    monkeypatch.setattr("veneer_client._replicas.LOOK_UP_S", 0.2)
    await asyncio.gather(first.start(), second.start())
    async with AsyncClient(
        dataset=kit.datasets.address, trainer=kit.registry.address, inference=[f"dns:///replicas.test:{port}"],
        token=kit.tokens["acme"],
    ) as client:  # fmt: skip
        load = Load(client, [kit.png(64, 64, seed) for seed in range(12)])
        await load.prepare()
        asking = [asyncio.create_task(load.ask_on(index)) for index in range(8)]

        async def until(holds: Any) -> None:
            await kit.until(lambda: holds() or any(task.done() for task in asking), 60)
            for task in asking:
                if task.done():
                    task.result()

        for replica in ("r1", "r2"):
            await until(load.answered(replica, 4))
        await third.start()
        there.append(third.bind)
        await until(load.answered("r3", 4))  # it joined
        assert await first.stop() == 0  # it drained
        there.remove(first.bind)
        await until(load.answered("r2", 4))
        assert load.cut == []
        await second.kill()  # it died, in the middle of answers
        died_s = time.monotonic()
        await until(load.answered("r3", 1))
        assert time.monotonic() - died_s < 2
        await until(load.answered("r3", 8))
        load.stop.set()
        await asyncio.gather(*asking)
        assert set(load.cut) <= {"r2"}
        assert len(load.cut) <= 4  # no more than there were streams
