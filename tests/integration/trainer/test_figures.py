"""The course of jobs, what Prometheus reads, and whose turn it is."""

import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1 import training_service_pb2 as jobs_pb

# What the conftest makes; a conftest cannot be imported.
Trainer = Worker = Kit = Make = Any


def progress(step: int, **values: float) -> job_pb.TrainingProgress:
    figures = job_pb.TrainingProgress(step=step, total_steps=10, loss=4.0 / step, learning_rate=0.5, **values)
    figures.measure_time.FromSeconds(1_000_000_000 + step)
    return figures


def curve(trainer: Trainer, name: str, token: str | None = None, most: int = 0) -> list[tuple[int, float, float]]:
    request = jobs_pb.GetTrainingCurveRequest(name=name, max_points=most)
    points = trainer.jobs(token).GetTrainingCurve(request, timeout=20).points
    return [(point.step, point.loss, point.validation_loss) for point in points]


def test_a_curve_has_every_step_that_was_told_and_ends_with_its_job(
    make_trainer: Make, base_digest: str, kit: Kit
) -> None:
    trainer = make_trainer(lease_s="60")
    trainer.start()
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    name = kit.create(trainer.jobs()).name
    assert curve(trainer, name) == []
    attempt = worker.acquire(5).attempt
    worker.beat(attempt, training=progress(4, validation_loss=0.5), earlier=[progress(1), progress(2)])
    trainer.kill()
    trainer.start()
    worker.beat(attempt, training=progress(8, validation_loss=0.5))
    worker.beat(attempt, training=progress(4, validation_loss=0.25))  # done again after a resume
    assert curve(trainer, name) == [(1, 4.0, 0), (2, 2.0, 0), (4, 1.0, 0.25), (8, 0.5, 0)]
    assert [step for step, *_ in curve(trainer, name, most=2)] == [1, 4, 8]
    for most in (1, 10_001, -1):
        with pytest.raises(grpc.RpcError, match="max_points"):
            curve(trainer, name, most=most)
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        curve(trainer, name, trainer.keys.other)
    metrics = Path(trainer.flags["data"]) / "metrics" / "acme"
    assert len(list(metrics.glob("*/events.out.tfevents.*"))) == 2
    worker.finish(attempt, failed=job_pb.Failure(reason="BROKEN", message="x"))
    trainer.jobs().DeleteTrainingJob(jobs_pb.DeleteTrainingJobRequest(name=name))
    assert not list(metrics.iterdir())


def test_prometheus_reads_work_and_what_happened(make_trainer: Make, base_digest: str, kit: Kit) -> None:
    port = kit.free_port()
    trainer = make_trainer(lease_s="60", metrics_port=str(port))
    trainer.start()
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    for name in ("first", "second"):
        kit.create(trainer.jobs(), name)
    attempt = worker.acquire(5).attempt
    worker.beat(attempt, training=progress(4, validation_loss=0.5))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
        lines = page.read().decode().splitlines()
    expected = [
        'veneer_trainer_work{kind="training",state="queued"} 1.0',
        'veneer_trainer_work{kind="training",state="running"} 1.0',
        'veneer_trainer_work{kind="evaluation",state="queued"} 0.0',
        'veneer_trainer_events_total{event="submitted",state=""} 2.0',
        'veneer_trainer_events_total{event="leased",state=""} 1.0',
        "veneer_trainer_workers 1.0",
        'veneer_job_loss{job="first",tenant="acme"} 1.0',
        'veneer_job_validation_loss{job="first",tenant="acme"} 0.5',
    ]
    assert not set(expected) - set(lines)
    assert trainer.kill(15) == 0


def test_turns_follow_the_weights_of_tenants(make_trainer: Make, base_digest: str, kit: Kit) -> None:
    trainer = make_trainer(lease_s="60", tenant_weights="acme=3", max_leased="7")
    trainer.start()
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    for token in (None, trainer.keys.other):
        for _ in range(8):
            kit.create(trainer.jobs(token))
    turns = [worker.acquire(5) for _ in range(8)]
    assert Counter(lease.tenant for lease in turns) == {"acme": 6, "other": 2}
    more = [worker.acquire(5).tenant for _ in range(3)]
    assert more.count("acme") == 1  # seven are all that it may have at once
    assert worker.finish(turns[0].attempt, released={}) == job_pb.JOB_STATE_QUEUED
    assert {worker.acquire(5).tenant for _ in range(2)} == {"acme", "other"}
