"""What is acknowledged survives kill -9 of every process; a job ends once, with one version."""

# ruff: noqa: ANN401  # the cluster's type stays in conftest

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from veneer.trainer.v1.training_job_pb2 import TrainingSpec
from veneer_client import Client

from .conftest import running

QUESTION = "Which digit is this? Answer with one digit from 0 to 9."
STEPS = 80  # a killed process must be at it still: how far it is is told once a second

pytestmark = pytest.mark.timeout(400)  # the machine may be busy


@pytest.fixture(scope="module")
def cluster(byte_base: Path) -> Iterator[Any]:
    """A cluster whose leases run out sooner, on a base that processes have in a moment when they start again."""
    with running("--base", byte_base, VENEER_TRAINER_LEASE_S="8", VENEER_TRAINER_HEARTBEAT_S="1") as made:
        yield made


def order(client: Client, folder: Path, name: str) -> str:
    """Queues a job that takes a while and stores checkpoints often."""
    client.datasets.push(folder, name)
    spec = TrainingSpec(checkpoint_interval_steps=5)
    return client.jobs.train(name, name, steps=STEPS, rank=4, batch_size=2, seed=3, spec=spec).name


def reached(client: Client, job: str, step: int) -> bool:
    found = client.jobs.get(job)
    assert not found.HasField("failure"), found
    return found.progress.step >= step


def ended_once(cluster: Any, job: str) -> str:
    """Waits for a job's success; returns the digest of its one version."""
    client: Client = cluster.client
    done = client.jobs.wait(job)
    versions = list(client.adapters.versions(done.spec.adapter))
    assert [version.name for version in versions] == [done.adapter_version]
    return versions[0].digest


@pytest.fixture(scope="module")
def undisturbed(cluster: Any, folder: Path) -> str:
    """The digest of the same job when nobody disturbs it."""
    return ended_once(cluster, order(cluster.client, folder, "undisturbed"))


@pytest.mark.parametrize("victim", ["child", "worker-1", "trainer", "dataset", "valkey"])
def test_a_job_survives_and_ends_once(cluster: Any, folder: Path, undisturbed: str, victim: str) -> None:
    client: Client = cluster.client
    job = order(client, folder, f"killed-{victim}")
    cluster.until(lambda: reached(client, job, 8))
    if victim == "child":
        cluster.kill_child("worker-1")
    elif victim == "valkey":
        cluster.kill("valkey")
        shutil.rmtree(cluster.folder.root / "valkey" / "appendonlydir", ignore_errors=True)
        cluster.kill("valkey")  # it comes back empty
    else:
        cluster.kill(victim)
    assert ended_once(cluster, job) == undisturbed
    attempts = len(client.jobs.get(job).attempts)
    assert attempts == (2 if victim in ("child", "worker-1") else 1), "it was over before, or began again for nothing"


def test_a_queued_job_survives_a_lost_queue(cluster: Any, folder: Path) -> None:
    client: Client = cluster.client
    jobs = [order(client, folder, f"queued-{number}") for number in range(2)]
    shutil.rmtree(cluster.folder.root / "valkey" / "appendonlydir", ignore_errors=True)
    cluster.kill("valkey")
    for job in jobs:
        ended_once(cluster, job)


def test_inference_heals(cluster: Any, folder: Path) -> None:
    client: Client = cluster.client
    picture = folder / "images" / "test" / "0000.png"
    job = client.jobs.train("queued-0", "healed", steps=1).name
    digest = ended_once(cluster, job)
    before = client.generate(QUESTION, image=picture, adapter="healed", max_tokens=4)
    cluster.kill_child("replica-1")  # its engine
    cluster.until(lambda: _answers(client, picture) == before.token_ids)
    cluster.kill("replica-1")
    cluster.until(lambda: _answers(client, picture) == before.token_ids)
    assert before.served_by.adapter_digest == digest


def _answers(client: Client, picture: Path) -> Any:
    from veneer_client import Unavailable

    try:
        return client.generate(QUESTION, image=picture, adapter="healed", max_tokens=4).token_ids
    except Unavailable:
        return None
