"""Estimates from what a worker has measured in idle time, against what a job then takes."""

from typing import Any

import grpc
import pytest

from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1 import training_service_pb2 as jobs_pb

from .conftest import ROWS, Cluster, push, until

pytestmark = pytest.mark.timeout(300)  # a process that loads torch takes long on a machine that is busy
Estimate = Answer = Any  # of generated code


MEASURING = {"calibrate_idle_s": "0.05"}


def asked(version: str) -> job_pb.TrainingSpec:
    return job_pb.TrainingSpec(
        model="models/tiny", dataset_version=version, adapter="adapters/estimated", steps=30,
        checkpoint_interval_steps=100,
    )  # fmt: skip


def estimate(cluster: Cluster, version: str) -> Estimate:
    return cluster.jobs().EstimateTrainingJob(jobs_pb.EstimateTrainingJobRequest(spec=asked(version)))


def create(cluster: Cluster, version: str) -> Answer:
    job = job_pb.TrainingJob(spec=asked(version))
    return cluster.jobs().CreateTrainingJob(jobs_pb.CreateTrainingJobRequest(training_job=job))


def test_an_idle_worker_measures_and_jobs_come_with_their_estimate(cluster: Cluster) -> None:
    rows = [{"image": f"{n}.png", "prompt": "What number?", "text": f"The number is {n * 37}."} for n in range(ROWS)]
    version = push(cluster.datasets(), "counted", {"train.jsonl": rows}, "models/tiny")
    worker = cluster.worker("measuring", **MEASURING)
    stored = cluster.folder / "measuring" / "calibrations"
    until(lambda: len(list(stored.glob("*.calibration"))) == 3, 120)
    until(lambda: estimate(cluster, version).HasField("duration"))
    told = estimate(cluster, version)
    assert (told.steps, told.fits, told.worker_class) == (30, True, "cpu-1x")
    assert told.total_tokens > 30 * told.tokens_per_epoch / ROWS
    assert 100e6 < told.peak_memory_bytes < told.available_memory_bytes
    created = create(cluster, version)
    assert created.estimate == told
    ended = cluster.ended(created.name)
    assert ended.adapter_version, ended.failure
    # A wide bound: a test shares its machine, and says nothing of the error on a quiet one.
    assert 0.5 < told.peak_memory_bytes / ended.progress.peak_memory_bytes < 2
    worker.close()

    # What was measured is announced again at once, and a worker that is too small takes nothing.
    small = cluster.worker("measuring", memory_bytes="1000000")
    until(lambda: not estimate(cluster, version).fits)
    with pytest.raises(grpc.RpcError, match=f"needs {told.peak_memory_bytes} bytes.* offers 1000000; what would fit"):
        create(cluster, version)
    small.close()
    usual = cluster.worker("measuring")
    until(lambda: estimate(cluster, version).fits)
    usual.close()
    assert len(list(stored.iterdir())) == 3
