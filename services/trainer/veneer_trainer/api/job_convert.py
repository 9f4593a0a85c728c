"""Training jobs, their figures and checkpoints between protobuf and the domain."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from veneer.trainer.v1 import model_pb2, training_job_pb2, worker_service_pb2
from veneer_trainer.api.spec_convert import spec_to_proto
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Contract, Estimate, Point, Progress, Resolved, TrainingJob
from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.training import JobView
from veneer_trainer.domain.work import Attempt, Failure
from veneer_trainer.ports import StoredCheckpoint

_PROGRESS = (
    "step", "total_steps", "epoch", "loss", "learning_rate", "gradient_norm", "tokens_per_second",
    "rows_per_second", "peak_memory_bytes", "validation_loss", "best_validation_loss",
)  # fmt: skip
_OPTIONAL_LOSSES = ("validation_loss", "best_validation_loss")
_RESOLVED = (
    "model_digest", "device", "trainable_parameters", "train_rows", "skipped_rows", "total_steps",
    "checkpoint_interval_steps", "activation_checkpointing",
)  # fmt: skip
_ESTIMATE = (
    "tokens_per_epoch", "total_tokens", "steps", "trainable_parameters", "peak_memory_bytes", "worker_class",
    "available_memory_bytes", "fits", "over_length_rows", "longest_row_tokens",
)  # fmt: skip


def job_to_proto(view: JobView) -> training_job_pb2.TrainingJob:
    """Writes a job."""
    job = view.job
    work, spec, outcome = job.work, job.order.spec, job.outcome
    message = training_job_pb2.TrainingJob(
        name=work.ref.name,
        uid=work.uid,
        display_name=job.order.display_name or _made_up_name(job),
        labels=job.order.labels,
        spec=spec_to_proto(spec),
        state=state_to_proto(work.state),
        estimate=estimate_to_proto(job.order.estimate),
        attempts=[_attempt(attempt) for attempt in view.attempts],
        adapter_version=outcome.adapter_version,
        evaluations=outcome.evaluations,
        queue_position=view.queue_position,
        revision=work.revision,
        create_time=timestamp(work.created_s),
        update_time=timestamp(work.updated_s),
    )
    if outcome.resolved is not None:
        message.resolved.CopyFrom(resolved_to_proto(outcome.resolved))
    if job.progress is not None:
        message.progress.CopyFrom(progress_to_proto(job.progress))
        message.progress.checkpoint_step = work.checkpoint_step
        if work.checkpoint_s is not None:
            message.progress.checkpoint_time.CopyFrom(timestamp(work.checkpoint_s))
    if work.failure is not None:
        message.failure.CopyFrom(failure_to_proto(work.failure))
    if work.delay_s:
        message.retry_time.CopyFrom(timestamp(work.queued_s + work.delay_s))
    if work.started_s is not None:
        message.start_time.CopyFrom(timestamp(work.started_s))
    if work.ended_s is not None:
        message.end_time.CopyFrom(timestamp(work.ended_s))
    return message


def state_to_proto(state: State) -> training_job_pb2.JobState.ValueType:
    """Writes a state."""
    return training_job_pb2.JobState.Value(f"JOB_STATE_{state.name}")


def states_from_proto(numbers: Any) -> set[State]:  # noqa: ANN401  # protobuf's repeated enum has no public type
    """Reads a filter; numbers that nobody knows and the unspecified one stand for nothing."""
    known = {training_job_pb2.JobState.Value(f"JOB_STATE_{state.name}"): state for state in State}
    return {known[number] for number in numbers if number in known}


def estimate_to_proto(estimate: Estimate) -> training_job_pb2.TrainingEstimate:
    """Writes an estimate; what is not known stays absent or 0."""
    message = training_job_pb2.TrainingEstimate(suggestions=estimate.suggestions)
    for name in _ESTIMATE:
        if (value := getattr(estimate, name)) is not None:
            setattr(message, name, value)
    if estimate.duration_s is not None:
        message.duration.CopyFrom(duration(estimate.duration_s))
    return message


def progress_to_proto(progress: Progress) -> training_job_pb2.TrainingProgress:
    """Writes figures; the last checkpoint is not among them."""
    message = training_job_pb2.TrainingProgress(
        elapsed=duration(progress.elapsed_s), measure_time=timestamp(progress.measured_s)
    )
    for name in _PROGRESS:
        if (value := getattr(progress, name)) is not None:
            setattr(message, name, value)
    if progress.remaining_s is not None:
        message.remaining.CopyFrom(duration(progress.remaining_s))
    return message


def progress_from_proto(message: training_job_pb2.TrainingProgress) -> Progress:
    """Reads figures."""
    values = {
        name: getattr(message, name)
        for name in _PROGRESS
        if name not in _OPTIONAL_LOSSES or message.HasField(name)  # type: ignore[arg-type]  # one of two names
    }
    return Progress(
        elapsed_s=seconds(message.elapsed),
        measured_s=message.measure_time.ToNanoseconds() / 1e9,
        remaining_s=seconds(message.remaining) if message.HasField("remaining") else None,
        **values,
    )


def point_to_proto(point: Point) -> training_job_pb2.TrainingProgress:
    """Writes a point of a curve."""
    message = training_job_pb2.TrainingProgress(step=point.step, measure_time=timestamp(point.measured_s))
    for name in (*Point.FIGURES, "validation_loss"):
        if (value := getattr(point, name)) is not None:
            setattr(message, name, int(value) if name == "peak_memory_bytes" else value)
    return message


def resolved_to_proto(resolved: Resolved) -> training_job_pb2.ResolvedTraining:
    """Writes what was resolved for a job."""
    message = training_job_pb2.ResolvedTraining(
        dtype=model_pb2.Dtype.Value(f"DTYPE_{resolved.dtype.upper()}"),
        target_modules=resolved.target_modules,
        numerics=resolved.numerics,
        co_trained_jobs=resolved.co_trained_jobs,
        **{name: getattr(resolved, name) for name in _RESOLVED},
    )
    if resolved.contract is not None:
        message.contract.CopyFrom(contract_to_proto(resolved.contract))
    return message


def contract_to_proto(contract: Contract) -> model_pb2.ProcessingContract:
    """Writes a processing contract."""
    return model_pb2.ProcessingContract(**{item.name: getattr(contract, item.name) for item in fields(Contract)})


def resolved_from_proto(message: training_job_pb2.ResolvedTraining) -> Resolved:
    """Reads what a worker resolved."""
    contract = None
    if message.HasField("contract"):
        values = {item.name: getattr(message.contract, item.name) for item in fields(Contract)}
        values |= {name: tuple(values[name]) for name in ("image_mean", "image_std")}
        contract = Contract(**values)
    return Resolved(
        contract=contract,
        dtype=dtype_from_proto(message.dtype),
        target_modules=tuple(message.target_modules),
        numerics=dict(message.numerics),
        co_trained_jobs=tuple(message.co_trained_jobs),
        **{name: getattr(message, name) for name in _RESOLVED},
    )


def dtype_from_proto(number: int) -> str:
    """Reads a dtype, such as `float32`."""
    return model_pb2.Dtype.Name(number).removeprefix("DTYPE_").lower()  # type: ignore[arg-type]  # from a message


def failure_to_proto(failure: Failure) -> training_job_pb2.Failure:
    """Writes a failure."""
    return training_job_pb2.Failure(reason=failure.reason, message=failure.message, transient=failure.transient)


def checkpoint_to_proto(checkpoint: StoredCheckpoint) -> worker_service_pb2.Checkpoint:
    """Writes what a checkpoint consists of."""
    return worker_service_pb2.Checkpoint(
        step=checkpoint.step,
        files=[
            model_pb2.ModelFile(path=file.path, digest=file.digest, size_bytes=file.size_bytes)
            for file in checkpoint.files
        ],
        fencing_token=checkpoint.token,
        create_time=timestamp(checkpoint.created_s),
    )


def files_from_proto(messages: Any) -> tuple[StoredFile, ...]:  # noqa: ANN401  # protobuf's repeated field
    """Reads announced files."""
    return tuple(StoredFile(file.path, file.digest, file.size_bytes) for file in messages)


def timestamp(seconds_since_1970: float) -> Timestamp:
    """Returns a point in time."""
    message = Timestamp()
    message.FromNanoseconds(round(seconds_since_1970 * 1e9))
    return message


def duration(seconds_long: float) -> Duration:
    """Returns a span of time."""
    message = Duration()
    message.FromNanoseconds(round(seconds_long * 1e9))
    return message


def seconds(message: Duration) -> float:
    """Returns the seconds of a span of time."""
    return message.ToNanoseconds() / 1e9


def _attempt(attempt: Attempt) -> training_job_pb2.Attempt:
    message = training_job_pb2.Attempt(
        number=attempt.number,
        worker=attempt.worker,
        start_time=timestamp(attempt.started_s),
        resumed_step=attempt.resumed_step,
        last_step=attempt.last_step,
    )
    if attempt.ended_s is not None:
        message.end_time.CopyFrom(timestamp(attempt.ended_s))
    if attempt.failure is not None:
        message.failure.CopyFrom(failure_to_proto(attempt.failure))
    return message


def _made_up_name(job: TrainingJob) -> str:
    adapter = job.spec.adapter.adapter if job.spec.adapter else ""
    return f"{adapter} {datetime.fromtimestamp(job.work.created_s, UTC):%Y-%m-%d %H:%M}"


def number_of(cursor: tuple[str | int, ...] | None) -> int | None:
    """Reads a page's cursor that is one number."""
    return None if cursor is None else int(cursor[0])


def age_of(cursor: tuple[str | int, ...] | None) -> tuple[float, str] | None:
    """Reads a page's cursor that is (created_s, uid)."""
    return None if cursor is None else (float(cursor[0]), str(cursor[1]))
