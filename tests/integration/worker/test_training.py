"""Jobs through a real trainer, dataset service and worker."""

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from veneer.trainer.v1 import training_service_pb2 as jobs_pb

from .conftest import ROWS, Cluster, free_port, push, until

Job = Any  # of generated code
# A process that loads torch takes long on a machine that is busy.
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("port")]


@pytest.fixture(scope="module")
def port(cluster: Cluster) -> Iterator[int]:
    """Where the worker that does all jobs here has its metrics."""
    chosen = free_port()
    worker = cluster.worker("steady", metrics_port=str(chosen))
    yield chosen
    worker.close()


@pytest.fixture(scope="module")
def first(cluster: Cluster, version: str, port: int) -> Job:  # the worker is to be there
    """A job that has ended."""
    return cluster.ended(cluster.create(version, "first"))


def first_loss(cluster: Cluster, job: str) -> float:
    """The loss of a job's first step."""
    points = cluster.jobs().GetTrainingCurve(jobs_pb.GetTrainingCurveRequest(name=job)).points
    assert points[0].step == 1
    loss: float = points[0].loss
    return loss


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


def test_a_job_goes_on_from_a_version(cluster: Cluster, version: str, first: Job, port: int) -> None:
    still = {"steps": 1, "optimizer": {"learning_rate": 1e-9}}  # as good as no step
    job = cluster.ended(cluster.create(version, "first", initial_adapter_version=first.adapter_version, **still))
    assert job.adapter_version == "adapters/first/versions/2", job.failure
    assert job.progress.validation_loss == pytest.approx(first.progress.validation_loss, abs=1e-4)
    assert job.progress.loss < first_loss(cluster, first.name) - 1e-3

    def counted() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
            return 'veneer_worker_attempts_total{kind="training",outcome="succeeded"} 2.0' in page.read().decode()

    until(counted)


def test_the_best_checkpoint_is_published(cluster: Cluster, version: str) -> None:
    """Without a schedule, one epoch of the stopped job is the whole of a shorter one."""
    steady = {"schedule": "SCHEDULE_CONSTANT", "warmup_ratio": 0.0, "learning_rate": 1e-2}
    stopping = {"patience": 1, "min_delta": 100.0}  # no validation after the first is better by so much
    stopped = cluster.create(version, "stopped", epochs=6, early_stopping=stopping, optimizer=steady)
    short = cluster.create(version, "short", steps=3, optimizer=steady)
    job = cluster.ended(stopped)
    assert (job.progress.step, job.progress.total_steps) == (6, 18)
    assert job.progress.best_validation_loss > job.progress.validation_loss
    assert cluster.published(stopped) == cluster.published(short)


def test_cancel(cluster: Cluster, version: str) -> None:
    job = cluster.create(version, "cancelled", steps=10_000)
    cluster.at_step(job, 2)
    cluster.jobs().CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=job))
    until(lambda: cluster.state(job) == "CANCELLED", 10)
    assert not cluster.digests(job)


def test_rows_that_are_too_long_are_refused_by_name_or_left_out(cluster: Cluster) -> None:
    rows: list[dict[str, str]] = [
        {"prompt": f"Count to {n}.", "text": "one two " * n, "image": "1.png"} for n in (1, 2, 30)
    ]
    version = push(cluster.datasets(), "lengths", {"train.jsonl": rows})
    refused = cluster.ended(cluster.create(version, "refused", max_length=64))
    assert refused.failure.reason == "ROWS_TOO_LONG"
    assert "split train has " in refused.failure.message
    skipped = cluster.ended(cluster.create(version, "skipped", max_length=64, over_length="OVER_LENGTH_SKIP"))
    assert skipped.adapter_version, skipped.failure
    assert (skipped.resolved.train_rows, skipped.resolved.skipped_rows) == (2, 1)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("tower", {"lora": {"target_modules": ["decoder+merger+vision"], "rank": 4}, "epochs": 1}),
        ("half", {"dtype": "DTYPE_BFLOAT16", "steps": 1}),
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
