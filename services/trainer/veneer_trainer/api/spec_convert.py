"""Training specs between protobuf and the domain. An absent field takes the domain's default."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar

from google.protobuf.message import Message

from veneer.trainer.v1 import model_pb2, training_job_pb2
from veneer_rpc.errors import Violations, violations
from veneer_rpc.names import AdapterName, AdapterVersionName, DatasetVersionName, ModelName
from veneer_trainer.domain.spec import (
    CoTrain,
    Dtype,
    EarlyStopping,
    Lora,
    Optimizer,
    OverLength,
    PlannedEvaluation,
    Priority,
    Schedule,
    TrainingSpec,
)

_E = TypeVar("_E", bound=Enum)

SCALARS = (
    "batch_size",
    "gradient_accumulation",
    "max_length",
    "max_pixels",
    "seed",
    "validation_interval_steps",
    "checkpoint_interval_steps",
)


def spec_from_proto(
    message: training_job_pb2.TrainingSpec, field: str = "spec", *, adapter_required: bool = True
) -> TrainingSpec:
    """Reads a spec and checks it.

    Args:
        message: what the caller sent.
        field: its path in the request, for the violations.
        adapter_required: False where nothing is published, as in an estimate.

    Raises:
        InvalidArgument: with every violation at once.
    """
    with violations() as found:
        model = found.attempt(ModelName.parse, message.model, f"{field}.model")
        version = found.attempt(DatasetVersionName.parse, message.dataset_version, f"{field}.dataset_version")
        adapter = None
        if message.adapter or adapter_required:
            adapter = found.attempt(AdapterName.parse, message.adapter, f"{field}.adapter")
        values = _present(message, SCALARS) | _length(message) | _enums(message, field, found)
        values["lora"] = _lora(message.lora)
        values["optimizer"] = _optimizer(message.optimizer, field, found)
        if message.train_split:
            values["train_split"] = message.train_split
        if message.validation_split:
            values["validation_split"] = message.validation_split
        if message.HasField("early_stopping"):
            stopping = message.early_stopping
            values["early_stopping"] = EarlyStopping(stopping.patience, stopping.min_delta)
        if message.initial_adapter_version:
            values["initial_adapter_version"] = found.attempt(
                AdapterVersionName.parse, message.initial_adapter_version, f"{field}.initial_adapter_version"
            )
        values["evaluations"] = _evaluations(message.evaluations, field, found)
        # Bounds do not depend on the names, so they are judged even when a name is wrong.
        placeholder_model, placeholder_version = ModelName("m"), DatasetVersionName("d", "0" * 64)
        spec = TrainingSpec(
            model=model or placeholder_model,
            dataset_version=version or placeholder_version,
            adapter=adapter,
            **values,
        )
        found.attempt(spec.check, field)
    return spec


def spec_to_proto(spec: TrainingSpec) -> training_job_pb2.TrainingSpec:
    """Writes a spec with every default filled in."""
    message = training_job_pb2.TrainingSpec(
        model=str(spec.model),
        dataset_version=str(spec.dataset_version),
        adapter=str(spec.adapter or ""),
        train_split=spec.train_split,
        validation_split=spec.validation_split or "",
        lora=lora_to_proto(spec.lora),
        optimizer=_message(
            training_job_pb2.OptimizerSpec,
            spec.optimizer,
            schedule=_number(training_job_pb2.Schedule, spec.optimizer.schedule),
        ),
        over_length=_number(training_job_pb2.OverLength, spec.over_length),
        dtype=_number(model_pb2.Dtype, spec.dtype),
        priority=_number(training_job_pb2.Priority, spec.priority),
        co_train=_number(training_job_pb2.CoTrain, spec.co_train),
        initial_adapter_version=str(spec.initial_adapter_version or ""),
        evaluations=[
            training_job_pb2.PlannedEvaluation(split=planned.split, dataset_version=str(planned.dataset_version or ""))
            for planned in spec.evaluations
        ],
    )
    for name in (*SCALARS, "epochs", "steps"):
        if (value := getattr(spec, name)) is not None:
            setattr(message, name, value)
    if spec.early_stopping is not None:
        message.early_stopping.CopyFrom(_message(training_job_pb2.EarlyStopping, spec.early_stopping))
    return message


def lora_to_proto(lora: Lora) -> training_job_pb2.LoraSpec:
    """Writes a low-rank update."""
    written: training_job_pb2.LoraSpec = _message(training_job_pb2.LoraSpec, lora)
    return written


def priority_to_proto(priority: Priority) -> training_job_pb2.Priority.ValueType:
    """Writes a priority."""
    number: training_job_pb2.Priority.ValueType = _number(training_job_pb2.Priority, priority)
    return number


def priority_from_proto(number: int, field: str, found: Violations) -> Priority:
    """Reads a priority, noting one that is unknown."""
    return _member(training_job_pb2.Priority, Priority, number, field, found) or Priority.NORMAL


def _present(message: Message, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _length(message: training_job_pb2.TrainingSpec) -> dict[str, Any]:
    match message.WhichOneof("length"):
        case "epochs":
            return {"epochs": message.epochs}
        case "steps":
            return {"epochs": None, "steps": message.steps}
        case _:
            return {}


def _enums(message: training_job_pb2.TrainingSpec, field: str, found: Violations) -> dict[str, Any]:
    kinds: dict[str, tuple[Any, type[Enum]]] = {
        "dtype": (model_pb2.Dtype, Dtype),
        "over_length": (training_job_pb2.OverLength, OverLength),
        "priority": (training_job_pb2.Priority, Priority),
        "co_train": (training_job_pb2.CoTrain, CoTrain),
    }
    read = {
        name: _member(wire, kind, getattr(message, name), f"{field}.{name}", found)
        for name, (wire, kind) in kinds.items()
    }
    return {name: value for name, value in read.items() if value is not None}


def _lora(message: training_job_pb2.LoraSpec) -> Lora:
    values = _present(message, ("rank", "alpha", "dropout"))
    if message.target_modules:
        values["target_modules"] = tuple(message.target_modules)
    return Lora(use_rslora=message.use_rslora, use_dora=message.use_dora, **values)


def _optimizer(message: training_job_pb2.OptimizerSpec, field: str, found: Violations) -> Optimizer:
    values = _present(message, (name.name for name in fields(Optimizer) if name.name != "schedule"))
    schedule = _member(training_job_pb2.Schedule, Schedule, message.schedule, f"{field}.optimizer.schedule", found)
    return Optimizer(**values | ({} if schedule is None else {"schedule": schedule}))


def _evaluations(
    messages: Iterable[training_job_pb2.PlannedEvaluation], field: str, found: Violations
) -> tuple[PlannedEvaluation, ...]:
    planned = []
    for index, message in enumerate(messages):
        version = None
        if message.dataset_version:
            place = f"{field}.evaluations[{index}].dataset_version"
            version = found.attempt(DatasetVersionName.parse, message.dataset_version, place)
        planned.append(PlannedEvaluation(message.split, version))
    return tuple(planned)


def _prefix(wire: Any) -> str:  # noqa: ANN401  # protobuf's enum wrappers have no common type in the stubs
    return str(wire.Name(0)).removesuffix("UNSPECIFIED")


def _member(wire: Any, kind: type[_E], number: int, field: str, found: Violations) -> _E | None:  # noqa: ANN401  # as above
    """The domain's member for an enum's number; None for the unspecified one, or after noting a violation."""
    if number == 0:
        return None
    known = number in wire.values()
    name = wire.Name(number).removeprefix(_prefix(wire)) if known else ""
    if name in kind.__members__:
        return kind[name]
    accepted = ", ".join(_prefix(wire) + member for member in kind.__members__)
    actual = wire.Name(number) if known else number
    found.add(field, "UNKNOWN_VALUE", f"must be one of {accepted}, was {actual}")
    return None


def _number(wire: Any, member: Enum) -> Any:  # noqa: ANN401  # as above
    return wire.Value(_prefix(wire) + member.name)


def _message(kind: type[Any], value: Any, **replaced: Any) -> Any:  # noqa: ANN401  # one dataclass, the message of its name
    """A protobuf message whose fields are named as the dataclass's."""
    return kind(**{item.name: getattr(value, item.name) for item in fields(value)} | replaced)
