"""What workers say between protobuf and the domain."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from veneer.trainer.v1 import worker_service_pb2
from veneer_rpc.errors import REASON, Violation, invalid, violations
from veneer_trainer.api.job_convert import dtype_from_proto, progress_from_proto, resolved_from_proto
from veneer_trainer.domain.attempts import Beat, Ending, Order
from veneer_trainer.domain.work import Failure, WorkKind
from veneer_trainer.domain.workers import Calibration, StepCost, Worker

_pb = worker_service_pb2
_MAX_NAME = 63
_MAX_MESSAGE_BYTES = 512


def worker_from_proto(message: _pb.WorkerInfo) -> Worker:
    """Reads who asks for work.

    Raises:
        InvalidArgument: with every field that is missing or malformed.
    """
    with violations() as found:
        if not 1 <= len(message.worker) <= _MAX_NAME:
            text = f"must be 1-{_MAX_NAME} characters, were {len(message.worker)}"
            found.add("worker.worker", "OUT_OF_RANGE", text)
        for name in ("device", "worker_class"):
            if not getattr(message, name):
                found.add(f"worker.{name}", "REQUIRED", "must be given")
        if message.memory_bytes <= 0:
            text = f"must be greater than 0, was {message.memory_bytes}"
            found.add("worker.memory_bytes", "OUT_OF_RANGE", text)
    return Worker(
        message.worker,
        message.device,
        message.worker_class,
        frozenset(map(dtype_from_proto, message.dtypes)),
        message.memory_bytes,
        {held.model: held.digest for held in message.models},
        tuple(map(_calibration, message.calibrations)),
        message.code_version,
        max(message.ranks, 1),
    )


def kinds_from_proto(numbers: Any, known: Collection[WorkKind]) -> set[WorkKind]:  # noqa: ANN401  # repeated enum
    """Reads which kinds of work are wanted; none named means all that are known here."""
    return {kind for kind in known if not numbers or _pb.WorkKind.Value(f"WORK_KIND_{kind.name}") in numbers}


def beat_from_proto(message: _pb.HeartbeatRequest) -> Beat:
    """Reads a sign of life."""
    return Beat(
        progress_from_proto(message.training) if message.HasField("training") else None,
        message.share_done,
        resolved_from_proto(message.resolved) if message.HasField("resolved") else None,
        tuple(map(progress_from_proto, message.earlier)),
        tuple(message.co_trained_jobs),
    )


def order_to_proto(order: Order) -> _pb.WorkerOrder.ValueType:
    """Writes what a worker must do."""
    return _pb.WorkerOrder.Value(f"WORKER_ORDER_{order.name}")


def ending_from_proto(message: _pb.FinishAttemptRequest) -> tuple[Ending, Failure | None]:
    """Reads how an attempt ended.

    Raises:
        InvalidArgument: no outcome is set, or a failure's reason is not UPPER_SNAKE.
    """
    outcome = message.WhichOneof("outcome")
    if outcome is None:
        raise invalid(Violation("outcome", "REQUIRED", "one of its fields must be set"))
    if outcome != "failed":
        return Ending(outcome), None
    failed = message.failed
    if not REASON.fullmatch(failed.reason):
        text = f"must be UPPER_SNAKE of 2 to 63 characters, was {failed.reason[:80]!r}"
        raise invalid(Violation("failed.reason", "INVALID_REASON", text))
    text = failed.message.encode()[:_MAX_MESSAGE_BYTES].decode(errors="ignore")
    return Ending.FAILED, Failure(failed.reason, text, failed.transient)


def _calibration(message: _pb.Calibration) -> Calibration:
    return Calibration(
        message.model_digest,
        dtype_from_proto(message.dtype),
        tuple(message.target_modules),
        message.rank,
        _cost(message.seconds),
        _cost(message.memory_bytes),
        message.tower_seconds_per_visual_token,
        message.kept_bytes_per_visual_token,
        message.kept_bytes_limit,
        message.least_memory_bytes,
    )


def _cost(message: _pb.StepCost) -> StepCost:
    return StepCost(
        message.fixed, message.per_text_token, message.per_visual_token, message.per_supervised_token,
        message.per_token_pair,
    )  # fmt: skip
