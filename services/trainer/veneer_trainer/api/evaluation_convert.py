"""Evaluations, samples and judgements between protobuf and the domain."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

from veneer.trainer.v1 import evaluation_pb2
from veneer_rpc.errors import violations
from veneer_rpc.names import DatasetVersionName
from veneer_trainer.api.job_convert import duration, failure_to_proto, state_to_proto, timestamp
from veneer_trainer.api.spec_convert import priority_from_proto, priority_to_proto
from veneer_trainer.domain.evaluations import Evaluation, EvaluationSpec, Judgement, Metric, Sample
from veneer_trainer.domain.lifecycle import State
from veneer_trainer.domain.work import Failure

_METRIC = tuple(item.name for item in fields(Metric))
_JUDGEMENT = ("subject", "other_subject", "score", "evaluation", "sample_index", "comment")


def spec_from_proto(message: evaluation_pb2.EvaluationSpec) -> EvaluationSpec:
    """Reads what to ask whom; bounds are checked by `EvaluationSpec.check`.

    Raises:
        InvalidArgument: the data's name or the priority.
    """
    with violations() as found:
        version = found.attempt(DatasetVersionName.parse, message.dataset_version, "spec.dataset_version")
        priority = priority_from_proto(message.priority, "spec.priority", found)
    assert version is not None  # noqa: S101  # or `violations` has raised
    return EvaluationSpec(
        message.subject, version, message.split or "test", message.max_samples, message.prompt, message.max_tokens,
        tuple(message.metrics), priority,
    )  # fmt: skip


def evaluation_to_proto(evaluation: Evaluation) -> evaluation_pb2.Evaluation:
    """Writes an evaluation."""
    work, spec, figures = evaluation.work, evaluation.spec, evaluation.figures
    message = evaluation_pb2.Evaluation(
        name=work.ref.name,
        spec=evaluation_pb2.EvaluationSpec(
            subject=spec.subject,
            dataset_version=str(spec.dataset_version),
            split=spec.split,
            max_samples=spec.max_samples,
            prompt=spec.prompt,
            max_tokens=spec.max_tokens,
            metrics=spec.metrics,
            priority=priority_to_proto(spec.priority),
        ),
        state=state_to_proto(work.state),
        answered_by_digest=evaluation.order.answered_by_digest,
        metrics=map(_metric_to_proto, figures.metrics),
        answered_samples=figures.answered,
        total_samples=figures.total,
        revision=work.revision,
        create_time=timestamp(work.created_s),
    )
    if work.state is State.RUNNING and work.started_s is not None and figures.answered:
        taken_s = max(time.time() - work.started_s, 0.0)
        left = figures.total - figures.answered
        message.remaining.CopyFrom(duration(taken_s / figures.answered * left))
    if work.failure is not None:
        message.failure.CopyFrom(failure_to_proto(work.failure))
    if work.ended_s is not None:
        message.end_time.CopyFrom(timestamp(work.ended_s))
    return message


def sample_from_proto(message: evaluation_pb2.Sample) -> Sample:
    """Reads a sample."""
    failure = None
    if message.HasField("failure"):
        failure = Failure(message.failure.reason, message.failure.message, message.failure.transient)
    return Sample(
        message.index, message.row_digest, tuple(message.picture_blobs), message.prompt, message.expected,
        message.answer, failure, metrics_from_proto(message.metrics), message.latency_ms,
    )  # fmt: skip


def sample_to_proto(sample: Sample) -> evaluation_pb2.Sample:
    """Writes a sample."""
    message = evaluation_pb2.Sample(
        index=sample.index,
        row_digest=sample.row_digest,
        picture_blobs=sample.picture_blobs,
        prompt=sample.prompt,
        expected=sample.expected,
        answer=sample.answer,
        metrics=map(_metric_to_proto, sample.metrics),
        latency_ms=sample.latency_ms,
    )
    if sample.failure is not None:
        message.failure.CopyFrom(failure_to_proto(sample.failure))
    return message


def metrics_from_proto(messages: Any) -> tuple[Metric, ...]:  # noqa: ANN401  # protobuf's repeated field
    """Reads figures."""
    return tuple(Metric(**{name: getattr(message, name) for name in _METRIC}) for message in messages)


def judgement_from_proto(message: evaluation_pb2.Judgement) -> Judgement:
    """Reads a verdict."""
    return Judgement(**{name: getattr(message, name) for name in _JUDGEMENT})


def judgement_to_proto(judgement: Judgement) -> evaluation_pb2.Judgement:
    """Writes a verdict."""
    return evaluation_pb2.Judgement(
        uid=judgement.uid,
        judge=judgement.judge,
        create_time=timestamp(judgement.created_s),
        **{name: getattr(judgement, name) for name in _JUDGEMENT},
    )


def _metric_to_proto(metric: Metric) -> evaluation_pb2.Metric:
    return evaluation_pb2.Metric(**{name: getattr(metric, name) for name in _METRIC})
