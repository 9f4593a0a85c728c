"""Many jobs, workers that die and fall silent, and the trainer and Valkey killed in the middle of it."""

import random
import signal
import threading
import time
from typing import Any

import grpc
import pytest

from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1 import training_service_pb2 as jobs_pb
from veneer.trainer.v1 import worker_service_pb2 as pb

# What the conftest makes; a conftest cannot be imported.
Trainer = Worker = Datasets = Valkey = Kit = Make = Any

ROUND = 16  # jobs between two outages of the same kind
STEPS = 4
AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED)
GIVEN_UP = (*AGAIN, grpc.StatusCode.ABORTED)


class Died(Exception):
    """A worker's end, as the seed has it."""


def state_at(work: str, step: int) -> dict[str, bytes]:
    return {"weights": f"{work} at {step}".encode() * 100}


def train(worker: Worker, chance: random.Random, folder: dict[str, bytes]) -> None:
    """One attempt: resumes, steps, checkpoints, publishes. Dies or falls silent now and then."""
    lease = worker.acquire(1)
    attempt, step = lease.attempt, 0
    if lease.HasField("checkpoint"):
        step, contents = worker.get_checkpoint(attempt)
        assert contents == state_at(attempt.work, step)
    while step < STEPS:
        if chance.random() < 0.08:
            raise Died
        if chance.random() < 0.05:
            time.sleep(2.5)  # longer than a lease: a zombie from here on
        step += 1
        if worker.beat(attempt, step).order != pb.WORKER_ORDER_CONTINUE:
            return
        worker.put_checkpoint(attempt, step, state_at(attempt.work, step))
    worker.publish(attempt, folder)
    worker.finish(attempt)


def run_worker(worker: Worker, seed: int, over: threading.Event, problems: list[BaseException], kit: Kit) -> None:
    chance, folder = random.Random(seed), kit.peft_folder(seed)  # noqa: S311  # which faults come, not a secret
    while not over.is_set():
        try:
            train(worker, chance, folder)
        except Died:
            continue
        except grpc.RpcError as error:
            if error.code() not in GIVEN_UP:
                problems.append(error)
        except AssertionError as error:
            problems.append(error)


@pytest.mark.parametrize(
    "count", [ROUND, pytest.param(13 * ROUND, marks=[pytest.mark.e2e_long, pytest.mark.timeout(1800)])]
)
def test_every_acknowledged_job_ends_once_whatever_dies(
    make_trainer: Make, base_digest: str, kit: Kit, valkey: Valkey, datasets: Datasets, count: int
) -> None:
    trainer = make_trainer(max_deaths="50")
    trainer.start()
    over, problems = threading.Event(), list[BaseException]()
    threads = []
    for index in range(3):
        worker = kit.Worker(trainer.worker_stub(), base_digest, f"w{index}")
        threads.append(threading.Thread(target=run_worker, args=(worker, index, over, problems, kit)))
    jobs = [trainer.jobs(), trainer.jobs(trainer.keys.other)]
    for thread in threads:
        thread.start()
    acknowledged = []

    def ended(some: list[tuple[Any, str]]) -> bool:
        return all(kit.get(owner, name).end_time.seconds for owner, name in some)

    for index in range(count):
        if index % ROUND == 0:  # work is under way in every round
            kit.until(lambda: ended(acknowledged[:-ROUND]), 120)
        if index % ROUND == 4:
            valkey.kill()
        if index % ROUND == 8:
            valkey.lose_data()
            valkey.start()
        if index % ROUND == 12:
            trainer.kill(signal.SIGKILL)
            trainer.start()
        owner = jobs[index % 2]
        job = kit.until_answered(lambda owner=owner, index=index: kit.create(owner, adapter=f"adapters/a{index}"))
        acknowledged.append((owner, job.name))
    kit.until(lambda: ended(acknowledged), 120)
    over.set()
    for thread in threads:
        thread.join(20)
    assert not problems
    for owner, name in acknowledged:
        job = kit.get(owner, name)
        assert job.state == job_pb.JOB_STATE_SUCCEEDED, job
        assert job.adapter_version
    everything = jobs_pb.ListTrainingJobsRequest(page_size=1000)
    listed = [job for owner in jobs for job in owner.ListTrainingJobs(everything).training_jobs]
    assert len(listed) == count
    kit.check_history(trainer)
    kit.check_quiet(trainer, valkey, datasets)
