"""Jobs through a real trainer, dataset service and worker."""

import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from veneer.trainer.v1 import training_service_pb2 as jobs_pb

from .conftest import LONG, ROWS, Cluster, free_port, push, until

Job = Any  # of generated code
pytestmark = pytest.mark.timeout(300)  # a process that loads torch takes long on a machine that is busy


@pytest.fixture(scope="module")
def first(cluster: Cluster, version: str) -> Job:
    """A job that has ended."""
    worker = cluster.worker("first")
    job: Job = cluster.ended(cluster.create(version, "first"))
    worker.close()
    return job


def first_loss(cluster: Cluster, job: str) -> float:
    """The loss of a job's first step."""
    points = cluster.jobs().GetTrainingCurve(jobs_pb.GetTrainingCurveRequest(name=job)).points
    assert points[0].step == 1
    loss: float = points[0].loss
    return loss


def published(cluster: Cluster, job: str) -> str:
    """The one digest of a job that is to succeed."""
    ended = cluster.ended(job)
    assert ended.adapter_version, ended.failure
    (digest,) = set(cluster.digests(job))
    return digest


def test_a_job_ends_with_one_version_and_its_figures(first: Job) -> None:
    job = first
    assert job.adapter_version == "adapters/first/versions/1", job.failure
    assert len(job.attempts) == 1
    progress, resolved = job.progress, job.resolved
    assert (progress.step, progress.total_steps, progress.epoch) == (6, 6, 2.0)
    assert 0 < progress.validation_loss == progress.best_validation_loss
    assert progress.loss > 0
    assert progress.gradient_norm > 0
    assert progress.tokens_per_second > progress.rows_per_second > 0
    assert progress.peak_memory_bytes > 100e6
    assert (resolved.train_rows, resolved.skipped_rows, resolved.total_steps) == (ROWS, 0, 6)
    assert resolved.trainable_parameters == sum(8 * (64 + out) for out in (128, 64)) * 2
    assert resolved.contract.digest
    assert resolved.numerics["threads"] == "1"


def test_kill_9_of_child_and_worker(cluster: Cluster, version: str, undisturbed: str) -> None:
    first = cluster.worker("doomed")
    job = cluster.create(version, "killed", **LONG)
    step = cluster.at_step(job, 3)
    (child,) = first.children
    child.kill()
    cluster.at_step(job, step + 2, attempts=2)
    (child,) = first.children
    first.signal(signal.SIGKILL)
    first.wait()
    until(lambda: not child.is_running() or child.status() == "zombie")
    second = cluster.worker("heir")
    assert published(cluster, job) == undisturbed
    attempts = cluster.get(job).attempts
    assert [attempt.worker for attempt in attempts] == ["doomed", "doomed", "heir"]
    assert [attempt.failure.reason for attempt in attempts] == ["PROCESS_DIED", "LEASE_LOST", ""]
    assert "SIGKILL" in attempts[0].failure.message
    assert 0 < attempts[1].resumed_step < attempts[2].resumed_step
    second.close()
    assert second.wait() == 0
    assert not list((cluster.folder / "heir" / "attempts").iterdir())


def test_sigterm_then_a_pause_then_kill_9_of_the_trainer(cluster: Cluster, version: str, undisturbed: str) -> None:
    first = cluster.worker("leaving")
    job = cluster.create(version, "steered", **LONG)
    step = cluster.at_step(job, 3)
    first.signal(signal.SIGTERM)
    assert first.wait() == 0
    given_back = cluster.get(job)
    assert cluster.state(job) == "QUEUED"
    assert given_back.progress.checkpoint_step >= given_back.progress.step >= step

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
    assert published(cluster, job) == undisturbed
    attempts = cluster.get(job).attempts
    assert len(attempts) == 3  # training went on while the trainer was away
    assert attempts[1].resumed_step == given_back.progress.checkpoint_step
    assert attempts[2].resumed_step == paused.progress.checkpoint_step
    second.close()


def test_a_job_goes_on_from_a_version(cluster: Cluster, version: str, first: Job) -> None:
    port = free_port()
    worker = cluster.worker("continuing", metrics_port=str(port))
    still = {"steps": 1, "optimizer": {"learning_rate": 1e-9}}  # as good as no step
    job = cluster.ended(cluster.create(version, "first", initial_adapter_version=first.adapter_version, **still))
    assert job.adapter_version == "adapters/first/versions/2", job.failure
    assert job.progress.validation_loss == pytest.approx(first.progress.validation_loss, abs=1e-4)
    assert job.progress.loss < first_loss(cluster, first.name) - 1e-3

    def ended() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
            return 'veneer_worker_attempts_total{kind="training",outcome="succeeded"} 1.0' in page.read().decode()

    until(ended)
    worker.close()


@pytest.mark.usefixtures("worker")
def test_the_best_checkpoint_is_published(cluster: Cluster, version: str) -> None:
    """Without a schedule, one epoch of the stopped job is the whole of a shorter one."""
    steady = {"schedule": "SCHEDULE_CONSTANT", "warmup_ratio": 0.0, "learning_rate": 1e-2}
    stopping = {"patience": 1, "min_delta": 100.0}  # no validation after the first is better by so much
    stopped = cluster.create(version, "stopped", epochs=6, early_stopping=stopping, optimizer=steady)
    short = cluster.create(version, "short", steps=3, optimizer=steady)
    job = cluster.ended(stopped)
    assert (job.progress.step, job.progress.total_steps) == (6, 18)
    assert job.progress.best_validation_loss > job.progress.validation_loss
    assert published(cluster, stopped) == published(cluster, short)


def test_a_dataset_service_that_is_away_is_waited_for(cluster: Cluster, version: str) -> None:
    job = cluster.create(version, "postponed", steps=2)
    cluster.dataset_process.close()
    worker = cluster.worker("patient", dataset_patience_s="0.3")
    until(lambda: cluster.get(job).HasField("retry_time"))
    waiting = cluster.get(job)
    assert (waiting.failure.reason, waiting.failure.transient) == ("DATASET_UNAVAILABLE", True)
    assert cluster.state(job) == "QUEUED"
    cluster.dataset_process = cluster.start_dataset()
    done = cluster.ended(job)
    assert done.adapter_version, done.failure
    assert {attempt.failure.reason for attempt in done.attempts} == {"DATASET_UNAVAILABLE", ""}
    worker.close()


@pytest.mark.usefixtures("worker")
def test_cancel(cluster: Cluster, version: str) -> None:
    job = cluster.create(version, "cancelled", steps=10_000)
    cluster.at_step(job, 2)
    cluster.jobs().CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=job))
    until(lambda: cluster.state(job) == "CANCELLED", 10)
    assert not cluster.digests(job)


@pytest.mark.usefixtures("worker")
def test_rows_that_are_too_long_are_refused_by_name_or_left_out(cluster: Cluster) -> None:
    rows: list[dict[str, str]] = [
        {"prompt": f"Count to {n}.", "text": "one two " * n, "image": "1.png"} for n in (1, 2, 30)
    ]
    version = push(cluster.datasets(), "lengths", {"train.jsonl": rows})
    refused = cluster.ended(cluster.create(version, "refused", max_length=48))
    assert refused.failure.reason == "ROWS_TOO_LONG"
    assert "split train has " in refused.failure.message
    skipped = cluster.ended(cluster.create(version, "skipped", max_length=48, over_length="OVER_LENGTH_SKIP"))
    assert skipped.adapter_version, skipped.failure
    assert (skipped.resolved.train_rows, skipped.resolved.skipped_rows) == (2, 1)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tower", {"lora": {"target_modules": ["decoder+merger+vision"], "rank": 4}}),
        ("half", {"dtype": "DTYPE_BFLOAT16"}),
        ("pictureless", {"epochs": 1, "batch_size": 5, "gradient_accumulation": 1}),
    ],
)
def test_kinds_of_jobs(cluster: Cluster, version: str, name: str, values: dict[str, Any]) -> None:
    job = cluster.ended(cluster.create(version, name, **values))
    assert job.adapter_version, job.failure


def test_settings_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    flags = {"data": tmp_path, "name": "x", "models": "a=/none", "trainer": "127.0.0.1:1", "token-file": "/none",
             "dataset": "elsewhere:1", "kinds": "baking"}  # fmt: skip
    command = [sys.executable, "-m", "veneer_trainer.worker"]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["models", "kinds", "dataset", "token_file"]
