"""A job from order to end, over real connections, with every call that its owner and its worker may make."""

import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1 import training_service_pb2 as jobs_pb
from veneer.trainer.v1 import worker_service_pb2 as pb
from veneer_rpc.delegation import DelegationVerifier

# What the conftest makes; a conftest cannot be imported.
Trainer = Worker = Datasets = Kit = Make = Refused = Any
Act = Callable[[], Any]

STATE = {"weights.safetensors": b"w" * 250_000, "rng.json": b"{}", "empty": b""}


def reason(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return error.code(), info.reason


@pytest.fixture
def trainer(make_trainer: Make) -> Trainer:
    """One whose leases outlast a busy machine."""
    started = make_trainer(lease_s="8")
    started.start()
    return started


@pytest.fixture
def refused() -> Refused:
    """Runs what must be refused, and returns status and reason."""

    def call(act: Act) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            act()
        return reason(caught.value)

    return call


def test_a_job_is_created_leased_checkpointed_published_and_finished(
    trainer: Trainer, worker: Worker, datasets: Datasets, kit: Kit
) -> None:
    jobs = trainer.jobs()
    job = kit.create(jobs, "first", seed=7)
    assert job.state == job_pb.JOB_STATE_QUEUED
    assert job.spec.seed == 7
    assert job.spec.validation_split == "validation"
    assert job.estimate.steps == 150
    assert job.queue_position == 0
    assert datasets.holders == {"trainingJobs/first"}

    lease = worker.acquire(wait_s=5)
    attempt = lease.attempt
    assert (attempt.work, lease.tenant) == ("trainingJobs/first", "acme")
    assert attempt.fencing_token > 0
    assert lease.training_job.state == job_pb.JOB_STATE_LEASED
    assert not lease.HasField("checkpoint")
    principal = DelegationVerifier("dataset", [trainer.keys.public_pem]).verify(lease.delegation)
    assert (principal.tenant, principal.subject, principal.roles) == ("acme", "w1", {"user"})

    resolved = job_pb.ResolvedTraining(model_digest=worker.digest, dtype=2, device="cpu", total_steps=150)
    answer = worker.beat(attempt, 1, resolved=resolved)
    assert answer.order == pb.WORKER_ORDER_CONTINUE
    assert answer.delegation
    worker.beat(attempt, 2, resolved=job_pb.ResolvedTraining(device="cuda", dtype=2))  # sealed: not heard
    assert worker.put_checkpoint(attempt, 2, STATE).step == 2
    job = kit.get(jobs, "trainingJobs/first")
    assert (job.state, job.progress.step) == (job_pb.JOB_STATE_RUNNING, 2)
    assert job.progress.checkpoint_step == 2
    assert job.resolved == resolved
    assert job.HasField("start_time")
    assert worker.get_checkpoint(attempt) == (2, STATE)

    version = worker.publish(attempt, kit.peft_folder())
    assert version.name == "adapters/digits/versions/1"
    assert worker.publish(attempt, kit.peft_folder()) == version  # its reply was lost: the same again
    assert kit.get(jobs, "trainingJobs/first").state == job_pb.JOB_STATE_PUBLISHING
    assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED

    job = kit.get(jobs, "trainingJobs/first")
    assert job.state == job_pb.JOB_STATE_SUCCEEDED
    assert job.adapter_version == version.name
    assert [(each.worker, each.last_step) for each in job.attempts] == [("w1", 2)]
    assert job.HasField("end_time")
    kit.until(lambda: not datasets.holders)


def test_a_job_joins_another_and_lineage_names_both(
    kit: Kit, trainer: Trainer, worker: Worker, refused: Refused
) -> None:
    jobs = trainer.jobs()
    for name in ("one", "other", "third"):
        kit.create(jobs, name, co_train=0 if name == "third" else job_pb.CO_TRAIN_ALLOWED)
    attempt = worker.acquire(wait_s=5).attempt
    joined = worker.acquire(beside=attempt).attempt
    assert [each.work for each in (attempt, joined)] == ["trainingJobs/one", "trainingJobs/other"]
    assert refused(lambda: worker.acquire(beside=attempt)) == (grpc.StatusCode.NOT_FOUND, "NO_WORK")
    resolved = job_pb.ResolvedTraining(model_digest=worker.digest, dtype=2, device="cpu", total_steps=150)
    names = ["trainingJobs/one", "trainingJobs/other"]
    worker.beat(attempt, 1, co_trained_jobs=names)  # before it is resolved it is not heard
    assert not kit.get(jobs, names[0]).HasField("resolved")
    worker.beat(attempt, 1, resolved=resolved, co_trained_jobs=names[1:])
    worker.beat(attempt, 2, co_trained_jobs=names[:1])
    assert list(kit.get(jobs, names[0]).resolved.co_trained_jobs) == names
    worker.finish(attempt, released=pb.AttemptReleased())
    assert refused(lambda: worker.acquire(beside=attempt)) == (grpc.StatusCode.ABORTED, "STALE_TOKEN")


def test_what_a_worker_asks_for_after_its_end_is_stale(
    trainer: Trainer, worker: Worker, kit: Kit, refused: Refused
) -> None:
    kit.create(trainer.jobs())
    attempt = worker.acquire(5).attempt
    assert worker.finish(attempt, released={}) == job_pb.JOB_STATE_QUEUED
    again = worker.acquire(5).attempt
    assert again.fencing_token > attempt.fencing_token
    stale = (grpc.StatusCode.ABORTED, "STALE_TOKEN")
    assert worker.beat(attempt, 5).order == pb.WORKER_ORDER_ABANDON
    assert refused(lambda: worker.put_checkpoint(attempt, 5, STATE)) == stale
    assert refused(lambda: worker.get_checkpoint(attempt)) == stale
    assert refused(lambda: worker.publish(attempt, kit.peft_folder())) == stale
    assert refused(lambda: worker.finish(attempt)) == stale
    assert worker.beat(again, 1).order == pb.WORKER_ORDER_CONTINUE
    made_up = pb.AttemptRef(work="trainingJobs/none", fencing_token=again.fencing_token)
    assert worker.beat(made_up).order == pb.WORKER_ORDER_ABANDON


def test_64_at_once_with_one_request_id_make_one_job(trainer: Trainer, kit: Kit, refused: Refused) -> None:
    jobs, request_id = trainer.jobs(), str(uuid.uuid4())
    with ThreadPoolExecutor(64) as pool:
        made = list(pool.map(lambda _: kit.create(jobs, request_id=request_id).name, range(64)))
    assert len(set(made)) == 1
    assert len(jobs.ListTrainingJobs(jobs_pb.ListTrainingJobsRequest()).training_jobs) == 1
    other = refused(lambda: kit.create(jobs, request_id=request_id, seed=1))
    assert other == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert kit.create(trainer.jobs(trainer.keys.other), request_id=request_id).name != made[0]


def test_two_tenants_see_nothing_of_each_other(trainer: Trainer, worker: Worker, kit: Kit, refused: Refused) -> None:
    mine, theirs = trainer.jobs(), trainer.jobs(trainer.keys.other)
    kit.create(mine, "same", seed=1)
    unknown = (grpc.StatusCode.NOT_FOUND, "WORK_UNKNOWN")
    assert refused(lambda: kit.get(theirs, "trainingJobs/same")) == unknown
    cancel = jobs_pb.CancelTrainingJobRequest(name="trainingJobs/same")
    assert refused(lambda: theirs.CancelTrainingJob(cancel)) == unknown
    watch = jobs_pb.WatchTrainingJobRequest(name="trainingJobs/same")
    assert refused(lambda: next(theirs.WatchTrainingJob(watch))) == unknown
    assert not theirs.ListTrainingJobs(jobs_pb.ListTrainingJobsRequest()).training_jobs
    kit.create(theirs, "same", seed=2)  # the same name, another job
    leases = {lease.tenant: lease for lease in (worker.acquire(5), worker.acquire(5))}
    assert leases["acme"].training_job.spec.seed == 1
    assert leases["other"].training_job.spec.seed == 2
    theirs.CancelTrainingJob(cancel)
    assert worker.beat(leases["acme"].attempt).order == pb.WORKER_ORDER_CONTINUE
    assert worker.beat(leases["other"].attempt).order == pb.WORKER_ORDER_CANCEL


def test_roles_are_kept_apart(trainer: Trainer, kit: Kit, refused: Refused) -> None:
    as_worker = trainer.jobs(trainer.keys.worker)
    assert refused(lambda: kit.create(as_worker))[0] == grpc.StatusCode.PERMISSION_DENIED
    nobody = trainer.jobs("vnr_nobody")
    assert refused(lambda: kit.create(nobody))[0] == grpc.StatusCode.UNAUTHENTICATED


def test_cancel_pause_and_resume_reach_a_worker_by_its_heartbeat(
    trainer: Trainer, worker: Worker, kit: Kit, refused: Refused
) -> None:
    jobs = trainer.jobs()
    name = kit.create(jobs, "steered").name
    attempt = worker.acquire(5).attempt
    worker.beat(attempt, 1)
    assert jobs.PauseTrainingJob(jobs_pb.PauseTrainingJobRequest(name=name)).state == job_pb.JOB_STATE_PAUSING
    assert worker.beat(attempt, 2).order == pb.WORKER_ORDER_PAUSE
    worker.put_checkpoint(attempt, 2, STATE)
    assert worker.finish(attempt, paused={}) == job_pb.JOB_STATE_PAUSED
    assert refused(lambda: worker.acquire()) == (grpc.StatusCode.NOT_FOUND, "NO_WORK")
    jobs.ResumeTrainingJob(jobs_pb.ResumeTrainingJobRequest(name=name))
    lease = worker.acquire(5)
    assert lease.checkpoint.step == 2
    jobs.CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=name))
    assert worker.beat(lease.attempt, 3).order == pb.WORKER_ORDER_CANCEL
    publishing = refused(lambda: worker.publish(lease.attempt, kit.peft_folder()))
    assert publishing == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    assert worker.finish(lease.attempt, cancelled={}) == job_pb.JOB_STATE_CANCELLED
    cancel = jobs_pb.CancelTrainingJobRequest(name=name)
    terminal = refused(lambda: jobs.CancelTrainingJob(cancel))
    assert terminal == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    jobs.DeleteTrainingJob(jobs_pb.DeleteTrainingJobRequest(name=name))
    assert refused(lambda: kit.get(jobs, name))[0] == grpc.StatusCode.NOT_FOUND


def test_failures_are_told_apart(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    jobs = trainer.jobs()
    name = kit.create(jobs, "fails").name
    transient = job_pb.Failure(reason="DATASET_UNAVAILABLE", message="away", transient=True)
    assert worker.finish(worker.acquire(5).attempt, failed=transient) == job_pb.JOB_STATE_QUEUED
    job = kit.get(jobs, name)
    assert job.failure == transient
    assert job.HasField("retry_time")
    failed = job_pb.Failure(reason="NON_FINITE_LOSS", message="nan at step 3")
    assert worker.finish(worker.acquire(5).attempt, failed=failed) == job_pb.JOB_STATE_FAILED
    assert kit.get(jobs, name).failure.reason == "NON_FINITE_LOSS"
    jobs.RetryTrainingJob(jobs_pb.RetryTrainingJobRequest(name=name))
    dead = job_pb.Failure(reason="PROCESS_DIED", message="signal 9", transient=True)
    states = [worker.finish(worker.acquire(5).attempt, failed=dead) for _ in range(3)]
    assert states == [job_pb.JOB_STATE_QUEUED] * 2 + [job_pb.JOB_STATE_DEAD_LETTERED]
    job = kit.get(jobs, name)
    assert job.failure.reason == "PROCESS_DIED"
    assert len(job.attempts) == 5


def test_a_watcher_gets_snapshots_with_growing_revisions_to_the_end(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    jobs = trainer.jobs()
    name = kit.create(jobs).name
    stream = jobs.WatchTrainingJob(jobs_pb.WatchTrainingJobRequest(name=name), timeout=30)
    first = next(stream).training_job
    attempt = worker.acquire(5).attempt
    for step in (1, 2):
        worker.beat(attempt, step)
        time.sleep(0.1)
    worker.publish(attempt, kit.peft_folder())
    worker.finish(attempt)
    seen = [first, *(response.training_job for response in stream)]
    revisions = [job.revision for job in seen]
    assert revisions == sorted(set(revisions))
    assert {job.progress.step for job in seen} >= {1, 2}
    assert seen[-1].state == job_pb.JOB_STATE_SUCCEEDED
    again = jobs.WatchTrainingJob(jobs_pb.WatchTrainingJobRequest(name=name, after_revision=revisions[0]))
    assert [response.training_job.state for response in again] == [job_pb.JOB_STATE_SUCCEEDED]


def test_lists_come_in_pages_newest_first_and_by_state(trainer: Trainer, kit: Kit) -> None:
    jobs = trainer.jobs()
    names = [kit.create(jobs, f"job-{index}").name for index in range(5)]
    jobs.CancelTrainingJob(jobs_pb.CancelTrainingJobRequest(name=names[1]))
    seen, token = [], ""
    while True:
        page = jobs.ListTrainingJobs(jobs_pb.ListTrainingJobsRequest(page_size=2, page_token=token))
        seen += [job.name for job in page.training_jobs]
        token = page.next_page_token
        if not token:
            break
    assert seen == names[::-1]
    cancelled = jobs_pb.ListTrainingJobsRequest(states=[job_pb.JOB_STATE_CANCELLED])
    assert [job.name for job in jobs.ListTrainingJobs(cancelled).training_jobs] == [names[1]]


def test_a_full_queue_says_when_to_come_again(make_trainer: Make, kit: Kit) -> None:
    trainer = make_trainer(max_queued="2")
    trainer.start()
    jobs = trainer.jobs()
    for _ in range(2):
        kit.create(jobs)
    with pytest.raises(grpc.RpcError) as caught:
        kit.create(jobs)
    assert reason(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(caught.value).details)
    assert retry.retry_delay.seconds > 0
    kit.create(trainer.jobs(trainer.keys.other))


def test_admission_asks_base_and_data(trainer: Trainer, datasets: Datasets, kit: Kit, refused: Refused) -> None:
    jobs = trainer.jobs()
    assert refused(lambda: kit.create(jobs, model="models/none")) == (grpc.StatusCode.NOT_FOUND, "MODEL_UNKNOWN")
    gone = kit.VERSION.replace("ab", "cd")
    assert refused(lambda: kit.create(jobs, dataset_version=gone))[0] == grpc.StatusCode.NOT_FOUND
    wrong = job_pb.LoraSpec(target_modules=["q_prj"])
    assert refused(lambda: kit.create(jobs, lora=wrong))[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert refused(lambda: kit.create(jobs, train_split="trian"))[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert not datasets.holders
    datasets.stop()
    away = (grpc.StatusCode.UNAVAILABLE, "DATASET_UNAVAILABLE")
    assert refused(lambda: kit.create(jobs)) == away
    datasets.start()
    kit.until_answered(lambda: kit.create(jobs))


def test_wrong_words_are_told(worker: Worker, trainer: Trainer, kit: Kit, refused: Refused) -> None:
    assert refused(lambda: worker.acquire(worker=""))[0] == grpc.StatusCode.INVALID_ARGUMENT
    kit.create(trainer.jobs())
    attempt = worker.acquire(5).attempt
    assert refused(lambda: worker.put_checkpoint(attempt, 1, {"../x": b"x"}))[0] == grpc.StatusCode.INVALID_ARGUMENT
    assert refused(lambda: worker.put_checkpoint(attempt, 1, {".manifest.json": b""}))[0] == (
        grpc.StatusCode.INVALID_ARGUMENT
    )
    assert refused(lambda: worker.finish(attempt)) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_PUBLISHED")
    header = pb.CheckpointHeader(attempt=attempt, step=1, files=kit.files_of(STATE))
    damaged = STATE | {"rng.json": b"[]"}
    pieces = kit.pieces(pb.PutCheckpointRequest, header, damaged)
    assert refused(lambda: worker.stub.PutCheckpoint(pieces)) == (grpc.StatusCode.DATA_LOSS, "FILE_DAMAGED")
    assert refused(lambda: worker.stub.PutCheckpoint(iter([]))) == (
        grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS",
    )  # fmt: skip
    assert refused(lambda: worker.get_checkpoint(attempt)) == (grpc.StatusCode.NOT_FOUND, "NO_CHECKPOINT")
