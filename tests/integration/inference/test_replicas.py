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
STREAMS = 8


class Load:
    """Asks on and on with several pictures, half of it in streams, and holds each answer to the right one."""

    def __init__(self, client: AsyncClient, pictures: list[bytes]) -> None:
        self.client = client
        self.pictures = pictures
        self.right: list[list[int]] = []
        self.by_replica: Counter[str] = Counter()
        self.cut: list[str] = []  # streams that had begun on a replica that was lost
        self.closing = False  # the last replica goes: what has not begun may be refused

    async def prepare(self) -> None:
        for picture in self.pictures:
            answer = await self.client.generate(QUESTION, image=picture, adapter="digits", max_tokens=MAX_TOKENS)
            self.right.append(list(answer.token_ids))

    async def ask_on(self, index: int) -> None:
        turn = index
        while True:
            turn += 1
            which = turn % len(self.pictures)
            asked: dict[str, Any] = {
                "image": self.pictures[which], "adapter": "digits", "max_tokens": MAX_TOKENS, "timeout_s": 30.0,
            }  # fmt: skip
            token_ids: list[int] = []
            replica = ""
            try:
                if index % 2:
                    answer = await self.client.generate(QUESTION, **asked)
                    token_ids, replica = list(answer.token_ids), answer.served_by.replica
                else:
                    async for piece in self.client.stream(QUESTION, **asked):
                        token_ids += piece.token_ids
                        replica = piece.served_by.replica or replica
            except Unavailable:
                if token_ids:
                    self.cut.append(replica)
                elif self.closing:
                    return
                else:
                    raise  # it had not begun: another replica should have answered
                continue
            assert token_ids == self.right[which]
            self.by_replica[replica] += 1

    def answered(self, replica: str, more: int) -> Any:
        goal = self.by_replica[replica] + more
        return lambda: self.by_replica[replica] >= goal


@pytest.mark.timeout(300)  # two processes load torch and a base
async def test_replicas_join_die_and_drain_under_load(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.train(1)
    kit.registry.promote("acme", "digits", production=1, preload=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second = (kit.process(f"r{number}", f"127.0.0.{number}:{port}") for number in (1, 2))
    there = [first.bind]

    async def resolve(name: str) -> list[str]:
        return list(there)

    monkeypatch.setattr("veneer_client._replicas.resolve", resolve)
    monkeypatch.setattr("veneer_client._replicas.LOOK_UP_S", 0.2)
    await asyncio.gather(first.start(), second.start())
    async with AsyncClient(
        dataset=kit.datasets.address, trainer=kit.registry.address, inference=[f"dns:///replicas.test:{port}"],
        token=kit.tokens["acme"],
    ) as client:  # fmt: skip
        load = Load(client, [kit.png(64, 64, seed) for seed in range(8)])
        await load.prepare()
        asking = [asyncio.create_task(load.ask_on(index)) for index in range(STREAMS)]

        async def until(holds: Any) -> None:
            await kit.until(lambda: holds() or any(task.done() for task in asking), 60)
            for task in asking:
                if task.done():
                    task.result()

        there.append(second.bind)
        await until(load.answered("r2", 4))  # it joined
        await second.kill()  # in the middle of answers
        died_s = time.monotonic()
        await until(load.answered("r1", 1))
        assert time.monotonic() - died_s < 2
        await until(load.answered("r1", 8))
        cut = list(load.cut)
        assert set(cut) <= {"r2"}
        assert len(cut) <= STREAMS // 2  # no more than there were streams
        load.closing = True
        assert await first.stop() == 0  # it drains: what has begun comes to its end
        await asyncio.gather(*asking)
        assert load.cut == cut
