"""Jobs whose worker, trainer or dataset service dies, leaves or is told to: they go on where they were."""

import contextlib
import signal
from typing import Any

import grpc
import pytest

from veneer.trainer.v1 import training_service_pb2 as jobs_pb

from .conftest import LONG, Cluster, until

Job = Any  # of generated code
pytestmark = pytest.mark.timeout(300)  # a process that loads torch takes long on a machine that is busy


def test_kill_9_of_child_and_worker(cluster: Cluster, version: str, undisturbed: str) -> None:
    first = cluster.worker("doomed")
    job = cluster.create(version, "killed", **LONG)
    step = cluster.at_step(job, 3)
    (child,) = first.children
    child.kill()
    cluster.at_step(job, step + 2, attempts=2)
    until(lambda: _kept_a_step(cluster.get(job)))
    (child,) = first.children
    first.signal(signal.SIGKILL)
    first.wait()
    until(lambda: not child.is_running() or child.status() == "zombie")
    second = cluster.worker("heir")
    assert cluster.published(job) == undisturbed
    attempts = cluster.get(job).attempts
    assert [attempt.worker for attempt in attempts] == ["doomed", "doomed", "heir"]
    assert [attempt.failure.reason for attempt in attempts] == ["PROCESS_DIED", "LEASE_LOST", ""]
    assert "SIGKILL" in attempts[0].failure.message
    assert 0 < attempts[1].resumed_step < attempts[2].resumed_step
    second.close()
    assert second.wait() == 0
    assert not list((cluster.folder / "heir" / "attempts").iterdir())


def _kept_a_step(job: Job) -> bool:
    """Whether a job's last attempt has stored a checkpoint of its own."""
    return bool(job.progress.checkpoint_step > job.attempts[-1].resumed_step)


def test_sigterm_then_a_pause_then_kill_9_of_the_trainer(cluster: Cluster, version: str, undisturbed: str) -> None:
    first = cluster.worker("leaving")
    job = cluster.create(version, "steered", **LONG)
    step = cluster.at_step(job, 3)
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    given_back = cluster.get(job)
    assert cluster.state(job) == "QUEUED"
    assert given_back.progress.checkpoint_step == given_back.progress.step >= step

    second = cluster.worker("coming")
    cluster.at_step(job, given_back.progress.checkpoint_step + 2, attempts=2)
    cluster.jobs().PauseTrainingJob(jobs_pb.PauseTrainingJobRequest(name=job))
    until(lambda: cluster.state(job) == "PAUSED")
    paused = cluster.get(job)
    cluster.restart_trainer()
    assert cluster.state(job) == "PAUSED"
    cluster.jobs().ResumeTrainingJob(jobs_pb.ResumeTrainingJobRequest(name=job))
    cluster.at_step(job, paused.progress.checkpoint_step + 2, attempts=3)
    cluster.restart_trainer()
    assert cluster.published(job) == undisturbed
    attempts = cluster.get(job).attempts
    assert len(attempts) == 3  # training went on while the trainer was away
    assert attempts[1].resumed_step == given_back.progress.checkpoint_step
    assert attempts[2].resumed_step == paused.progress.checkpoint_step
    second.close()


def test_a_dataset_service_that_is_away_is_waited_for(cluster: Cluster, version: str) -> None:
    job = cluster.create(version, "postponed", steps=2)
    cluster.dataset_process.close()
    with pytest.raises(grpc.RpcError, match="the dataset service does not answer"):
        cluster.create(version, "refused", steps=2)
    worker = cluster.worker("patient", dataset_patience_s="0.3")
    until(lambda: cluster.get(job).HasField("retry_time"))
    waiting = cluster.get(job)
    assert (waiting.failure.reason, waiting.failure.transient) == ("DATASET_UNAVAILABLE", True)
    assert cluster.state(job) == "QUEUED"
    cluster.dataset_process = cluster.start_dataset()
    done = cluster.ended(job)
    assert done.adapter_version, done.failure
    assert {attempt.failure.reason for attempt in done.attempts} == {"DATASET_UNAVAILABLE", ""}
    until(lambda: accepted(cluster, version), 5)  # the trainer finds it again by itself
    worker.close()


def accepted(cluster: Cluster, version: str) -> bool:
    with contextlib.suppress(grpc.RpcError):
        name = cluster.create(version, "postponed-too", steps=2)
        cluster.jobs().CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=name))
        return True
    return False
