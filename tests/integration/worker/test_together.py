"""Jobs that share passes over the base, in one process of a real worker."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1 import training_service_pb2 as jobs_pb

from .conftest import Cluster, Process, push, until

Job = Any  # of generated code
pytestmark = pytest.mark.timeout(300)  # a process that loads torch takes long on a machine that is busy
STEPS = 8
# Half a second each, so that the others come while the first trains, and that each step is told: quicker ones are not.
SLOW = {"VENEER_FAILPOINTS": "step.moved=slow"}
TOGETHER: dict[str, Any] = {"steps": STEPS, "co_train": "CO_TRAIN_ALLOWED", "checkpoint_interval_steps": 10}
VARIED: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2, "lora": {"rank": 16}}]


def losses(cluster: Cluster, job: str) -> dict[int, float]:
    request = jobs_pb.GetTrainingCurveRequest(name=job, max_points=1000)
    return {point.step: point.loss for point in cluster.jobs().GetTrainingCurve(request).points}


def train(cluster: Cluster, version: str, name: str, **values: Any) -> str:  # noqa: ANN401  # of a spec
    return cluster.create(version, name, **TOGETHER | values)


@pytest.fixture(scope="module")
def worker(cluster: Cluster) -> Iterator[Process]:
    started = cluster.worker("together", SLOW)
    yield started
    started.close()


@pytest.mark.usefixtures("worker")
def test_jobs_that_may_share_are_trained_together_and_learn_what_they_learn_alone(
    cluster: Cluster, version: str
) -> None:
    alone = [train(cluster, version, f"alone-{at}", **each, co_train=0) for at, each in enumerate(VARIED)]
    for name in alone:
        assert not cluster.ended(name).resolved.co_trained_jobs
    names = [train(cluster, version, f"together-{at}", **each) for at, each in enumerate(VARIED)]
    jobs = [cluster.ended(name) for name in names]
    for job, name in zip(jobs, alone, strict=True):
        assert job.adapter_version, job.failure
        assert list(job.resolved.co_trained_jobs) == sorted(names)
        own, shared = losses(cluster, name), losses(cluster, job.name)
        both = own.keys() & shared.keys()
        assert len(both) > 5
        assert [shared[step] for step in sorted(both)] == pytest.approx([own[step] for step in sorted(both)], abs=1e-4)
        assert own[STEPS] < own[min(own)] - 0.01, "nothing was learned"


@pytest.mark.usefixtures("worker")
def test_what_becomes_of_one_is_nothing_to_the_others(cluster: Cluster, version: str) -> None:
    rows = [{"prompt": "Count.", "text": "one two " * 30, "image": "1.png"}]
    long = push(cluster.datasets(), "long", {"train.jsonl": rows})
    lasting = train(cluster, version, "lasting", steps=3 * STEPS)
    cancelled = train(cluster, version, "cancelled", steps=10_000)
    paused = train(cluster, version, "paused", steps=10_000)
    broken = train(cluster, long, "broken", max_length=48)
    cluster.at_step(cancelled, 2)
    cluster.at_step(paused, 2)
    cluster.jobs().CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=cancelled))
    cluster.jobs().PauseTrainingJob(jobs_pb.PauseTrainingJobRequest(name=paused))
    until(lambda: cluster.state(cancelled) == "CANCELLED", 10)
    until(lambda: cluster.state(paused) == "PAUSED", 10)
    assert cluster.ended(broken).failure.reason == "ROWS_TOO_LONG"
    job = cluster.ended(lasting)
    assert job.adapter_version, job.failure
    assert len(job.attempts) == 1
    assert set(job.resolved.co_trained_jobs) >= {lasting, cancelled, paused}
    cluster.jobs().CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=paused))


def test_jobs_that_were_lost_together_end_alone(cluster: Cluster, version: str, worker: Process) -> None:
    names = [train(cluster, version, f"lost-{at}") for at in range(2)]
    for name in names:
        cluster.at_step(name, 1)
    worker.children[0].kill()
    for name in names:
        job = cluster.ended(name)
        assert job.adapter_version, job.failure
        assert [attempt.failure.reason for attempt in job.attempts] == ["PROCESS_DIED", ""]


def test_a_worker_that_goes_gives_all_of_them_back(cluster: Cluster, version: str, worker: Process) -> None:
    names = [train(cluster, version, f"going-{at}", steps=10_000) for at in range(2)]
    for name in names:
        cluster.at_step(name, 1)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    for name in names:
        job = cluster.get(name)
        assert job.state == job_pb.JOB_STATE_QUEUED
        assert job.progress.checkpoint_step > 0
        cluster.jobs().CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=name))
