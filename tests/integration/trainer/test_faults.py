"""The fault table, each row at a named place: kill, cut off, fill up, damage, then see that nothing is lost."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1 import training_service_pb2 as jobs_pb
from veneer.trainer.v1 import worker_service_pb2 as pb

# What the conftest makes; a conftest cannot be imported.
Trainer = Worker = Datasets = Valkey = Kit = Make = Any
Act = Callable[[], Any]

STATE = {"weights.safetensors": b"w" * 300_000, "rng.json": b"{}"}


def status_of(act: Act) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    return caught.value.code()


def finish_all(worker: Worker, kit: Kit, count: int) -> list[str]:
    """Takes and finishes so many jobs, and sees that there is no more."""
    done = []
    for _ in range(count):
        attempt = worker.acquire(10).attempt
        worker.publish(attempt, kit.peft_folder())
        assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED
        done.append(attempt.work)
    assert status_of(lambda: worker.acquire(1)) == grpc.StatusCode.NOT_FOUND
    return done


def test_a_worker_that_falls_silent_loses_its_lease_and_its_late_writes(
    trainer: Trainer, worker: Worker, kit: Kit
) -> None:
    name = kit.create(trainer.jobs()).name
    zombie = worker.acquire(5).attempt
    last = time.monotonic()  # the lease runs from within the call, neither from before it nor from its answer
    worker.beat(zombie, 3)
    worker.put_checkpoint(zombie, 3, STATE)
    silent = time.monotonic()
    lease = worker.acquire(10)
    lost = time.monotonic()
    assert lost - last > kit.LEASE_S
    assert lost - silent < 2 * kit.LEASE_S
    assert lease.checkpoint.step == 3
    assert worker.beat(zombie, 4).order == pb.WORKER_ORDER_ABANDON
    assert status_of(lambda: worker.put_checkpoint(zombie, 4, STATE)) == grpc.StatusCode.ABORTED
    assert status_of(lambda: worker.publish(zombie, kit.peft_folder())) == grpc.StatusCode.ABORTED
    assert worker.get_checkpoint(lease.attempt) == (3, STATE)
    attempts = kit.get(trainer.jobs(), name).attempts
    assert [(each.failure.reason, each.last_step) for each in attempts] == [("LEASE_LOST", 3), ("", 3)]
    kit.check_history(trainer)


def test_a_write_that_began_before_the_lease_was_lost_does_not_land(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    kit.create(trainer.jobs())
    attempt = worker.acquire(5).attempt
    released = threading.Event()
    header = pb.CheckpointHeader(attempt=attempt, step=1, files=kit.files_of(STATE))

    def slowly() -> Iterator[pb.PutCheckpointRequest]:
        yield from list(kit.pieces(pb.PutCheckpointRequest, header, STATE))[:-1]
        released.wait(20)
        yield list(kit.pieces(pb.PutCheckpointRequest, header, STATE))[-1]

    writing = worker.stub.PutCheckpoint.future(slowly())
    lease = worker.acquire(10)
    released.set()
    assert writing.code() == grpc.StatusCode.ABORTED
    assert status_of(lambda: worker.get_checkpoint(lease.attempt)) == grpc.StatusCode.NOT_FOUND


def test_a_job_that_kills_its_workers_is_buried_with_the_cause(
    trainer: Trainer, worker: Worker, kit: Kit, valkey: Valkey
) -> None:
    jobs = trainer.jobs()
    poison = kit.create(jobs, "poison").name
    for _ in range(3):
        assert worker.acquire(10).attempt.work == poison
    kit.until(lambda: kit.get(jobs, poison).state == job_pb.JOB_STATE_DEAD_LETTERED)
    job = kit.get(jobs, poison)
    assert job.failure.reason == "LEASE_LOST"
    assert len(job.attempts) == 3


def test_stored_progress_forgives_deaths(make_trainer: Make, base_digest: str, kit: Kit) -> None:
    trainer = make_trainer(max_deaths="2")
    trainer.start()
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    name = kit.create(trainer.jobs()).name
    for step in (1, 2, 3):
        attempt = worker.acquire(10).attempt
        worker.put_checkpoint(attempt, step, STATE)
    kit.until(lambda: kit.get(trainer.jobs(), name).state == job_pb.JOB_STATE_QUEUED)


def test_a_step_that_hangs_while_the_heartbeat_lives_counts_as_dead(
    make_trainer: Make, base_digest: str, kit: Kit
) -> None:
    trainer = make_trainer(stall_s="1.5")
    trainer.start()
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    name = kit.create(trainer.jobs()).name
    attempt = worker.acquire(5).attempt
    begin, step = time.monotonic(), 0
    while worker.beat(attempt, min(step, 10)).order == pb.WORKER_ORDER_CONTINUE:
        assert time.monotonic() - begin < 10
        step += 1
        time.sleep(0.2)
    assert 10 * 0.2 + 1.5 <= time.monotonic() - begin < 10 * 0.2 + 1.5 + 2
    assert kit.get(trainer.jobs(), name).failure.reason == "PROGRESS_STALLED"


def test_a_released_attempt_does_not_count_and_is_taken_again_at_once(
    make_trainer: Make, base_digest: str, kit: Kit
) -> None:
    trainer = make_trainer(max_deaths="1")
    trainer.start()
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    kit.create(trainer.jobs())
    for _ in range(3):
        begin = time.monotonic()
        attempt = worker.acquire(5).attempt
        assert time.monotonic() - begin < 1
        assert worker.finish(attempt, released={}) == job_pb.JOB_STATE_QUEUED


@pytest.mark.parametrize("place", ["lease.durable", "lease.made"])
def test_a_worker_that_hangs_up_while_it_is_given_work_takes_nothing_along(
    make_trainer: Make, base_digest: str, kit: Kit, place: str
) -> None:
    trainer = make_trainer(lease_s="20")
    trainer.start(f"{place}=slow:1")
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    name = kit.create(trainer.jobs()).name
    with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
        worker.acquire(timeout_s=0.25)
    assert worker.acquire(5).attempt.work == name
    assert [each.failure.reason for each in kit.get(trainer.jobs(), name).attempts] == ["", ""]


def test_valkey_killed_and_restarted_loses_none_of_50_submits(
    trainer: Trainer, worker: Worker, valkey: Valkey, kit: Kit, datasets: Datasets
) -> None:
    jobs = trainer.jobs()
    names = [kit.create(jobs, f"a-{index}").name for index in range(20)]
    valkey.kill()
    names += [kit.create(jobs, f"b-{index}").name for index in range(10)]  # accepted: the database has them
    assert status_of(lambda: worker.acquire()) == grpc.StatusCode.UNAVAILABLE
    valkey.start()
    names += [kit.create(jobs, f"c-{index}").name for index in range(20)]
    worker.finish(kit.until_answered(lambda: worker.acquire(5)).attempt, released={})
    assert sorted(finish_all(worker, kit, 50)) == sorted(names)
    kit.check_history(trainer)
    kit.check_quiet(trainer, valkey, datasets)


def test_valkey_that_lost_its_data_is_filled_again_and_nothing_comes_twice(
    trainer: Trainer, worker: Worker, valkey: Valkey, kit: Kit, datasets: Datasets
) -> None:
    jobs = trainer.jobs()
    names = [kit.create(jobs, f"a-{index}").name for index in range(10)]
    held = worker.acquire(5).attempt
    valkey.kill()
    valkey.lose_data()
    valkey.start()
    for _ in range(8):
        worker.beat(held, 1)
        time.sleep(0.2)
    worker.publish(held, kit.peft_folder())
    assert worker.finish(held) == job_pb.JOB_STATE_SUCCEEDED
    assert sorted([held.work, *finish_all(worker, kit, 9)]) == sorted(names)
    assert all(len(kit.get(jobs, name).attempts) == 1 for name in names)
    kit.check_history(trainer)
    kit.check_quiet(trainer, valkey, datasets)


def test_valkey_away_for_less_than_a_lease_restarts_nothing(
    trainer: Trainer, worker: Worker, valkey: Valkey, kit: Kit
) -> None:
    name = kit.create(trainer.jobs()).name
    attempt = worker.acquire(5).attempt
    valkey.kill()
    for step in range(1, 12):
        assert worker.beat(attempt, step).order == pb.WORKER_ORDER_CONTINUE
        time.sleep(0.2)
    valkey.start()
    worker.publish(attempt, kit.peft_folder())
    assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED
    assert len(kit.get(trainer.jobs(), name).attempts) == 1


def submit_and_take(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    kit.create(trainer.jobs(), "only")
    worker.acquire(5)


@pytest.mark.parametrize("place", ["job.durable", "lease.taken", "lease.durable"])
def test_a_trainer_killed_between_two_stores_loses_no_job(
    place: str, make_trainer: Make, base_digest: str, kit: Kit, valkey: Valkey, datasets: Datasets
) -> None:
    trainer = make_trainer()
    trainer.start(f"{place}=kill")
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    with pytest.raises(grpc.RpcError):
        submit_and_take(trainer, worker, kit)
    assert trainer.wait() == -signal.SIGKILL
    trainer.start()
    assert finish_all(worker, kit, 1) == ["trainingJobs/only"]
    kit.check_history(trainer)
    kit.check_quiet(trainer, valkey, datasets)


@pytest.mark.parametrize(
    ("place", "resumes_at"),
    [("checkpoint.manifest", 1), ("checkpoint.rename", 1), ("checkpoint.stored", 2)],
)
def test_a_trainer_killed_while_it_stores_a_checkpoint_has_a_whole_one(
    place: str, resumes_at: int, make_trainer: Make, base_digest: str, kit: Kit
) -> None:
    trainer = make_trainer()
    trainer.start(f"{place}=kill:2")
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    name = kit.create(trainer.jobs()).name
    attempt = worker.acquire(5).attempt
    worker.put_checkpoint(attempt, 1, STATE | {"step": b"1"})
    with pytest.raises(grpc.RpcError):
        worker.put_checkpoint(attempt, 2, STATE | {"step": b"2"})
    assert trainer.wait() == -signal.SIGKILL
    trainer.start()
    assert worker.get_checkpoint(attempt) == (resumes_at, STATE | {"step": str(resumes_at).encode()})
    assert worker.beat(attempt, 3).order == pb.WORKER_ORDER_CONTINUE  # the lease outlived the trainer
    folder = Path(trainer.flags["data"]) / "checkpoints" / kit.get(trainer.jobs(), name).uid
    assert not list(folder.glob(".incoming-*"))


def test_a_trainer_killed_while_it_publishes_makes_one_version(
    make_trainer: Make, base_digest: str, kit: Kit, valkey: Valkey, datasets: Datasets
) -> None:
    trainer = make_trainer()
    trainer.start("publish.recorded=kill")
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    name = kit.create(trainer.jobs()).name
    attempt = worker.acquire(5).attempt
    with pytest.raises(grpc.RpcError):
        worker.publish(attempt, kit.peft_folder())
    assert trainer.wait() == -signal.SIGKILL
    trainer.start()
    version = worker.publish(attempt, kit.peft_folder())
    assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED
    job = kit.get(trainer.jobs(), name)
    assert (job.adapter_version, len(job.attempts)) == (version.name, 1)
    assert version.name == "adapters/digits/versions/1"
    kit.check_history(trainer)
    kit.check_quiet(trainer, valkey, datasets)


def test_a_full_disk_leaves_the_last_checkpoint_and_goes_on_after_space(
    make_trainer: Make, base_digest: str, kit: Kit
) -> None:
    trainer = make_trainer()
    trainer.start("file.write=full:6")
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    kit.create(trainer.jobs())
    attempt = worker.acquire(5).attempt
    worker.put_checkpoint(attempt, 1, STATE)  # four pieces
    assert status_of(lambda: worker.put_checkpoint(attempt, 2, STATE)) == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert worker.get_checkpoint(attempt) == (1, STATE)
    worker.put_checkpoint(attempt, 2, STATE)
    assert worker.get_checkpoint(attempt) == (2, STATE)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: str, trainer: Trainer, worker: Worker, kit: Kit
) -> None:
    name = kit.create(trainer.jobs()).name
    attempt = worker.acquire(5).attempt
    for step in (1, 2, 3):
        worker.put_checkpoint(attempt, step, STATE)
    root = Path(trainer.flags["data"]) / "checkpoints" / kit.get(trainer.jobs(), name).uid
    kept = sorted(root.iterdir())
    assert [int(folder.name.split("-")[1]) for folder in kept] == [2, 3]
    target = kept[-1] / (".manifest.json" if damage == "manifest" else "weights.safetensors")
    data = target.read_bytes()
    target.unlink()
    if damage in ("flip", "manifest"):
        target.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "cut":
        target.write_bytes(data[:-1])
    assert worker.get_checkpoint(attempt) == (2, STATE)


def test_the_dataset_service_away_touches_no_running_job_and_holds_come_back(
    trainer: Trainer, worker: Worker, kit: Kit, datasets: Datasets
) -> None:
    name = kit.create(trainer.jobs()).name
    attempt = worker.acquire(5).attempt
    datasets.stop()
    datasets.holders.clear()
    for step in range(1, 6):
        assert worker.beat(attempt, step).order == pb.WORKER_ORDER_CONTINUE
    trainer.kill()
    datasets.start()
    trainer.start()
    kit.until(lambda: datasets.holders == {name})
    datasets.stop()
    worker.publish(attempt, kit.peft_folder())
    assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED
    datasets.start()
    kit.until(lambda: not datasets.holders, 30)


def test_a_paused_job_stays_paused_when_everything_restarts(
    trainer: Trainer, worker: Worker, kit: Kit, valkey: Valkey
) -> None:
    jobs = trainer.jobs()
    name = kit.create(jobs).name
    jobs.PauseTrainingJob(jobs_pb.PauseTrainingJobRequest(name=name))
    trainer.kill(signal.SIGTERM)
    valkey.kill()
    valkey.start()
    trainer.start()
    assert status_of(lambda: worker.acquire(1)) == grpc.StatusCode.NOT_FOUND
    jobs.ResumeTrainingJob(jobs_pb.ResumeTrainingJobRequest(name=name))
    assert worker.acquire(5).attempt.work == name
