"""A rollback reaches every replica in time."""

# ruff: noqa: ANN401  # the cluster's type stays in conftest

import time
from pathlib import Path
from typing import Any

import pytest

from veneer_client import Client

QUESTION = "Which digit is this? Answer with one digit from 0 to 9."
FOLLOWS_WITHIN_S = 5.0


@pytest.mark.e2e_long
@pytest.mark.timeout(600)
def test_the_last_replica_follows_a_rollback_by_hand_or_by_policy_within_5_s(pair: Any, folder: Path) -> None:
    client: Client = pair.client
    client.datasets.push(folder, "digits")
    for seed in (1, 2):
        client.jobs.wait(client.jobs.train("digits", "digits", steps=2, rank=4, seed=seed).name)
    picture = folder / "images" / "test" / "0001.png"
    where = client.cluster
    replicas = [
        Client(dataset=where.dataset, trainer=where.trainer, inference=[address], token=where.token)
        for address in where.inference
    ]
    assert len(replicas) == 2

    def served() -> set[int]:
        answers = [each.generate(QUESTION, image=picture, adapter="digits", max_tokens=1) for each in replicas]
        assert len({answer.served_by.replica for answer in answers}) == 2
        return {int(answer.served_by.adapter_version.rpartition("/")[2]) for answer in answers}

    def follows(version: int) -> float:
        began_s = time.monotonic()
        pair.until(lambda: served() == {version}, within_s=60)
        return time.monotonic() - began_s

    follows(1)
    client.adapters.promote("digits", 2)
    follows(2)
    client.adapters.rollback("digits")
    by_hand_s = follows(1)
    client.adapters.canary("digits", 2, 1.0, min_judgement=0.5, min_answers=1)
    follows(2)
    client.evaluations.judge("digits@2", 0.0)
    by_policy_s = follows(1)
    for each in replicas:
        each.close()
    assert max(by_hand_s, by_policy_s) < FOLLOWS_WITHIN_S, (by_hand_s, by_policy_s)
    print(f"the last of two replicas followed after {by_hand_s:.2f} s by hand, {by_policy_s:.2f} s by policy")
