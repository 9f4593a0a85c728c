"""Jobs that two processes under torchrun's agent train together, for a real worker."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from veneer.trainer.v1 import training_service_pb2 as jobs_pb

from .conftest import Cluster, Process, until

Job = Any  # of generated code
pytestmark = pytest.mark.timeout(300)  # a process that loads torch takes long on a machine that is busy
STEPS = 5
# Without dropout, whose masks are drawn for a pass: two ranks have other passes than one.
JOB: dict[str, Any] = {"steps": STEPS, "validation_interval_steps": 2, "lora": {"dropout": 0.0}}
# Half a second a step, so that each is told: quicker ones are not.
SLOW = {"VENEER_FAILPOINTS": "step.moved=slow"}


@pytest.fixture(scope="module")
def alone(cluster: Cluster, version: str) -> Job:
    """The job as one rank trains it."""
    worker = cluster.worker("one", SLOW)
    job = cluster.ended(cluster.create(version, "alone", **JOB))
    worker.close()
    return job


@pytest.fixture(scope="module")
def pair(cluster: Cluster, alone: Job) -> Iterator[Process]:  # which is to have ended before another takes work
    """A worker of two ranks."""
    started = cluster.worker("pair", SLOW, ranks="2")
    yield started
    started.close()


def losses(cluster: Cluster, job: str) -> list[float]:
    """Losses of all steps, then what validation gave."""
    request = jobs_pb.GetTrainingCurveRequest(name=job, max_points=1000)
    points = list(cluster.jobs().GetTrainingCurve(request).points)
    assert [point.step for point in points] == list(range(1, STEPS + 1))
    return [point.loss for point in points] + [point.validation_loss for point in points]


def ranks(worker: Process) -> list[psutil.Process]:
    """The processes that train, rank 0 first."""
    return [rank for agent in worker.children for rank in agent.children()]


def ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == "zombie"


def test_two_ranks_learn_from_the_rows_of_a_step_what_one_learns(
    cluster: Cluster, version: str, alone: Job, pair: Process
) -> None:
    shared = cluster.ended(cluster.create(version, "shared", **JOB))
    assert shared.adapter_version, shared.failure
    assert len(shared.attempts) == 1
    assert not pair.children
    features = cluster.folder / "pair" / "features"
    assert len(list(features.glob("*.features"))) > 0 < len(list(features.glob("rank-1/*.features")))
    assert losses(cluster, shared.name) == pytest.approx(losses(cluster, alone.name), abs=1e-5)
    assert (shared.resolved.numerics["ranks"], alone.resolved.numerics["ranks"]) == ("2", "1")
    assert shared.progress.epoch == alone.progress.epoch


def test_ranks_train_one_job_until_it_is_cancelled(cluster: Cluster, version: str, pair: Process) -> None:
    jobs = [
        cluster.create(version, f"ranks-cancelled-{at}", steps=10_000, co_train="CO_TRAIN_ALLOWED") for at in range(2)
    ]
    cluster.at_step(jobs[0], 2)
    processes = ranks(pair)
    assert len(processes) == 2
    assert cluster.state(jobs[1]) == "QUEUED"
    for job in reversed(jobs):
        cluster.jobs().CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=job))
    until(lambda: cluster.state(jobs[0]) == "CANCELLED", 10)
    until(lambda: all(map(ended, processes)), 10)


def test_a_rank_that_dies_takes_the_others_along_and_the_job_goes_on(
    cluster: Cluster, version: str, pair: Process
) -> None:
    job = cluster.create(version, "ranks-killed", **JOB)
    cluster.at_step(job, 2)
    processes = ranks(pair)
    processes[1].kill()
    done = cluster.ended(job)
    assert all(map(ended, processes))
    assert done.adapter_version, done.failure
    assert [attempt.failure.reason for attempt in done.attempts] == ["PROCESS_DIED", ""]
    assert done.attempts[1].resumed_step >= 1
    assert len(cluster.digests(job)) == 1


def kill_worker(worker: Process) -> None:
    worker.signal(signal.SIGKILL)
    worker.wait()


@pytest.mark.e2e_long
@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (kill_worker, "LEASE_LOST"),
        (lambda worker: worker.children[0].kill(), "PROCESS_DIED"),
        (lambda worker: ranks(worker)[0].kill(), "PROCESS_DIED"),
    ],
    ids=["worker", "agent", "rank-0"],
)
def test_no_rank_is_left_and_another_worker_may_go_on(
    cluster: Cluster,
    version: str,
    pair: Process,
    end: Callable[[Process], None],
    reason: str,
    request: pytest.FixtureRequest,
) -> None:
    """The other has one rank: the job's steps are the same."""
    pair.close()  # it might take the job
    name = request.node.callspec.id
    doomed = cluster.worker(f"doomed-{name}", SLOW, ranks="2")
    job = cluster.create(version, f"orphans-{name}", **JOB)
    cluster.at_step(job, 2)
    processes = ranks(doomed)
    end(doomed)
    until(lambda: all(map(ended, processes)), 10)
    doomed.close()
    heir = cluster.worker(f"heir-{name}")
    done = cluster.ended(job)
    heir.close()
    assert done.adapter_version, done.failure
    assert (done.progress.step, done.attempts[0].failure.reason) == (STEPS, reason)
    assert len(cluster.digests(job)) == 1


@pytest.mark.e2e_long
def test_all_ranks_pause_at_the_same_step_and_one_that_hangs_holds_nobody(
    cluster: Cluster, version: str, pair: Process
) -> None:
    pair.close()
    worker = cluster.worker("steered-pair", SLOW, ranks="2")
    job = cluster.create(version, "ranks-paused", **JOB | {"steps": 12})
    cluster.at_step(job, 2)
    cluster.jobs().PauseTrainingJob(jobs_pb.PauseTrainingJobRequest(name=job))
    until(lambda: cluster.state(job) == "PAUSED", 10)
    paused = cluster.get(job)
    assert paused.progress.checkpoint_step == paused.progress.step
    cluster.jobs().ResumeTrainingJob(jobs_pb.ResumeTrainingJobRequest(name=job))
    cluster.at_step(job, paused.progress.step + 1, attempts=2)
    processes = ranks(worker)
    processes[1].suspend()
    cluster.jobs().CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=job))
    until(lambda: cluster.state(job) == "CANCELLED", 10)
    until(lambda: all(map(ended, processes)), 10)
    worker.close()
