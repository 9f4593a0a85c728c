"""How two adapter versions differ: the data and the parameters they were made with, and their figures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from veneer.trainer.v1.adapter_pb2 import AdapterVersion
from veneer.trainer.v1.evaluation_pb2 import Evaluation
from veneer.trainer.v1.training_job_pb2 import JobState
from veneer_client._diff import DatasetDiff

_NO_PARAMETERS = {"dataset_version", "evaluations", "priority"}  # of a spec


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs; None where a side has no such thing."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class AdapterDiff:
    """What changed between two versions.

    Attributes:
        before: the earlier version.
        after: the later version.
        data: how their datasets differ row by row; None where both saw the same, or one is not there any more.
        parameters: differing settings of training, by their path in TrainingSpec; origin and code among them.
        metrics: figures of training, and of evaluations that asked both the same rows, where they differ.
    """

    before: AdapterVersion
    after: AdapterVersion
    data: DatasetDiff | None
    parameters: tuple[Change, ...]
    metrics: tuple[Change, ...]


def parameters(before: AdapterVersion, after: AdapterVersion) -> tuple[Change, ...]:
    """Returns the settings that differ."""
    return tuple(_changes(dict(_settings(before)), dict(_settings(after))))


def metrics(
    before: AdapterVersion,
    after: AdapterVersion,
    evaluations_before: Sequence[Evaluation],
    evaluations_after: Sequence[Evaluation],
) -> tuple[Change, ...]:
    """Returns the figures that differ; of evaluations of the same rows the newest count, which come first."""
    old, new = _figures(evaluations_before), _figures(evaluations_after)
    shared = [rows for rows in new if rows in old]
    found = list(_changes(dict(_progress(before)), dict(_progress(after))))
    for rows in shared:
        found += _changes(old[rows], new[rows])
    return tuple(found)


def _settings(version: AdapterVersion) -> Iterator[tuple[str, Any]]:
    lineage = version.lineage
    yield "model_digest", version.contract.model_digest
    yield "origin", "imported" if lineage.HasField("imported") else "trained"
    yield "code_version", lineage.code_version
    if lineage.HasField("spec"):
        for path, value in _leaves(_fields(lineage.spec)):
            if path.partition(".")[0] not in _NO_PARAMETERS:
                yield path, value
    else:
        yield from _leaves({"lora": _fields(version.lora)})


def _progress(version: AdapterVersion) -> Iterator[tuple[str, float]]:
    if version.HasField("final_progress"):
        yield "training: loss", version.final_progress.loss
        if version.final_progress.HasField("validation_loss"):
            yield "training: validation loss", version.final_progress.validation_loss


def _figures(evaluations: Sequence[Evaluation]) -> dict[tuple[str, str, int, str], dict[str, float]]:
    """By the rows that were asked, figures by name."""
    found: dict[tuple[str, str, int, str], dict[str, float]] = {}
    for each in reversed(evaluations):
        if each.state == JobState.JOB_STATE_SUCCEEDED:
            spec = each.spec
            rows = (spec.dataset_version, spec.split, spec.max_samples, spec.prompt)
            dataset = "/".join(spec.dataset_version.split("/")[1:2])
            found[rows] = {f"{dataset} {spec.split}: {metric.metric}": metric.value for metric in each.metrics}
    return found


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _fields(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return fields


def _changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    for name in [*before, *(name for name in after if name not in before)]:
        if before.get(name) != after.get(name):
            yield Change(name, before.get(name), after.get(name))
