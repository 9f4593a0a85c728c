import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.trainer.v1 import training_job_pb2 as pb
from veneer_rpc.errors import InvalidArgument
from veneer_rpc.names import AdapterName, AdapterVersionName, DatasetVersionName, ModelName
from veneer_trainer.api.spec_convert import spec_from_proto, spec_to_proto
from veneer_trainer.domain.spec import (
    PRESETS,
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

VERSION = DatasetVersionName("digits", "ab" * 32)
REQUIRED = {"model": "models/tiny", "dataset_version": str(VERSION), "adapter": "adapters/digits"}


def test_an_empty_spec_is_the_owners_job() -> None:
    spec = spec_from_proto(pb.TrainingSpec(**REQUIRED))
    assert (spec.lora.rank, spec.lora.alpha, spec.lora.dropout) == (8, 16.0, 0.05)
    assert spec.lora.target_modules == ("attention",)  # q_proj and v_proj of the decoder
    assert spec.optimizer.learning_rate == 2e-4
    assert (spec.epochs, spec.steps) == (3, None)
    assert (spec.batch_size, spec.gradient_accumulation) == (1, 2)
    assert (spec.max_length, spec.max_pixels) == (512, 448 * 448)
    assert spec.dtype is Dtype.AUTO
    assert spec.over_length is OverLength.REFUSE
    assert spec.co_train is CoTrain.FORBIDDEN


def test_the_filled_in_spec_shows_every_default() -> None:
    message = spec_to_proto(spec_from_proto(pb.TrainingSpec(**REQUIRED)))
    assert message.lora.rank == 8
    assert message.optimizer.schedule == pb.SCHEDULE_COSINE
    assert message.HasField("seed")
    assert message.seed == 0
    assert message.WhichOneof("length") == "epochs"


def test_zero_is_a_value_and_not_an_absence() -> None:
    message = pb.TrainingSpec(**REQUIRED, lora=pb.LoraSpec(dropout=0.0))
    message.optimizer.warmup_ratio = 0.0
    spec = spec_from_proto(message)
    assert (spec.lora.dropout, spec.optimizer.warmup_ratio) == (0.0, 0.0)


def test_every_violation_is_told_at_once() -> None:
    message = pb.TrainingSpec(
        model="models/Tiny",
        dataset_version="datasets/digits",
        adapter="../adapters/x",
        batch_size=0,
        epochs=0,
        dtype=4,  # DTYPE_INT8: serving only
        priority=99,
        lora=pb.LoraSpec(rank=0, dropout=1.0, target_modules=["attention", ".*"], use_dora=True),
        optimizer=pb.OptimizerSpec(learning_rate=math.nan),
        evaluations=[pb.PlannedEvaluation(split="Test", dataset_version="x")],
    )
    with pytest.raises(InvalidArgument) as raised:
        spec_from_proto(message)
    assert {violation.field for violation in raised.value.violations} == {
        "spec.model",
        "spec.dataset_version",
        "spec.adapter",
        "spec.batch_size",
        "spec.epochs",
        "spec.dtype",
        "spec.priority",
        "spec.lora.rank",
        "spec.lora.dropout",
        "spec.lora.use_dora",
        "spec.lora.target_modules",
        "spec.lora.target_modules[1]",
        "spec.optimizer.learning_rate",
        "spec.evaluations[0].split",
        "spec.evaluations[0].dataset_version",
    }


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("lora.rank", -1, "must be at least 1, at most 512, was -1"),
        ("lora.rank", 10**6, "must be at least 1, at most 512, was 1e+06"),
        ("lora.alpha", 0.0, "must be greater than 0, at most 4096, was 0"),
        ("optimizer.learning_rate", 0.0, "must be greater than 0, at most 1, was 0"),
        ("optimizer.learning_rate", math.inf, "must be greater than 0, at most 1, was inf"),
        ("optimizer.max_gradient_norm", math.inf, "must be at least 0, was inf"),
        ("steps", 10**12, "must be at least 1, at most 1e+07, was 1e+12"),
        ("max_pixels", 1023, "must be at least 1024, was 1023"),
        ("seed", -1, "must be at least 0, at most 9.22337e+18, was -1"),
    ],
)
def test_a_number_out_of_range_names_limit_and_value(path: str, value: float, told: str) -> None:
    message = pb.TrainingSpec(**REQUIRED)
    *parents, leaf = path.split(".")
    owner = message
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, leaf, value)
    with pytest.raises(InvalidArgument) as raised:
        spec_from_proto(message)
    assert [(found.field, found.description) for found in raised.value.violations] == [(f"spec.{path}", told)]


def test_an_estimate_needs_no_adapter() -> None:
    message = pb.TrainingSpec(model="models/tiny", dataset_version=str(VERSION))
    assert spec_from_proto(message, adapter_required=False).adapter is None
    with pytest.raises(InvalidArgument, match=r"spec\.adapter"):
        spec_from_proto(message)


ids = st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
splits = st.from_regex(r"[a-z0-9_-]{1,32}", fullmatch=True)
versions = st.builds(DatasetVersionName, ids, st.from_regex(r"[0-9a-f]{64}", fullmatch=True))
shares = st.floats(0, 1, exclude_max=True)
loras = st.builds(
    Lora,
    rank=st.integers(1, 512),
    alpha=st.floats(0, 4096, exclude_min=True),
    dropout=shares,
    target_modules=st.sampled_from(PRESETS).map(lambda name: (name,))
    | st.lists(st.sampled_from(["q_proj", "o_proj", "visual.merger.linear_fc1"]), min_size=1).map(tuple),
    use_rslora=st.booleans(),
    use_dora=st.just(False),  # refused
)
optimizers = st.builds(
    Optimizer,
    learning_rate=st.floats(0, 1, exclude_min=True),
    schedule=st.sampled_from(Schedule),
    warmup_ratio=st.floats(0, 1),
    weight_decay=st.floats(0, 1),
    beta1=shares,
    beta2=shares,
    max_gradient_norm=st.floats(0, 1e300),
)
specs = st.builds(
    TrainingSpec,
    model=st.builds(ModelName, ids),
    dataset_version=versions,
    adapter=st.builds(AdapterName, ids),
    train_split=splits,
    validation_split=st.none() | splits,
    lora=loras,
    optimizer=optimizers,
    epochs=st.integers(1, 10_000),
    batch_size=st.integers(1, 1024),
    gradient_accumulation=st.integers(1, 1024),
    max_length=st.integers(16, 2**31 - 1),
    over_length=st.sampled_from(OverLength),
    max_pixels=st.integers(1024, 2**63 - 1),
    dtype=st.sampled_from(Dtype),
    seed=st.integers(0, 2**63 - 1),
    priority=st.sampled_from(Priority),
    co_train=st.sampled_from(CoTrain),
    validation_interval_steps=st.integers(0, 10_000_000),
    early_stopping=st.none() | st.builds(EarlyStopping, st.integers(1, 1000), st.floats(0, 1e300)),
    checkpoint_interval_steps=st.none() | st.integers(1, 10_000_000),
    initial_adapter_version=st.none() | st.builds(AdapterVersionName, ids, st.integers(1, 2**31 - 1)),
    evaluations=st.lists(
        st.builds(PlannedEvaluation, split=splits, dataset_version=st.none() | versions), max_size=8
    ).map(tuple),
)


@given(specs, st.none() | st.integers(1, 10_000_000))
def test_a_good_spec_survives_the_wire(spec: TrainingSpec, steps: int | None) -> None:
    if steps is not None:
        spec = dataclasses.replace(spec, epochs=None, steps=steps)
    wire = pb.TrainingSpec.FromString(spec_to_proto(spec).SerializeToString())
    assert spec_from_proto(wire) == spec
