import dataclasses
import math

from hypothesis import given
from hypothesis import strategies as st

from veneer_rpc.names import AdapterName, DatasetVersionName, ModelName
from veneer_trainer.domain.estimate import PASS_TOKENS, estimate, total_steps
from veneer_trainer.domain.spec import Dtype, Lora, TrainingSpec
from veneer_trainer.domain.targets import Linear
from veneer_trainer.domain.workers import Calibration, StepCost, Worker
from veneer_trainer.ports import BaseModel, SplitFacts

SPEC = TrainingSpec(ModelName("m"), DatasetVersionName("d", "0" * 64), AdapterName("a"))
LINEARS = {f"layers.{index}.{name}": Linear("decoder", 64, 64) for index in range(2) for name in ("q_proj", "v_proj")}
BASE = BaseModel(ModelName("m"), "digest", 4096, 1 << 20, LINEARS)
SPLIT = SplitFacts(rows=100, visual_tokens=900, prompt_tokens=500, supervised_tokens=100, longest_row=30)
COSTS = Calibration(
    "digest", "float32", tuple(sorted(LINEARS)), 8,
    StepCost(0.5, 0.01, 0.02, 0.1, 0.001), StepCost(1000, 10, 20, 0),
)  # fmt: skip
WORKER = Worker("w", "cpu", "cpu-2x", frozenset({"float32"}), 10_000, {"models/m": "digest"}, (COSTS,))


def test_steps_tokens_time_and_memory_are_the_sums_they_should_be() -> None:
    taken = estimate(SPEC, BASE, SPLIT, [WORKER])
    assert taken.steps == 3 * 50
    assert (taken.tokens_per_epoch, taken.total_tokens) == (1500, 4500)
    assert taken.trainable_parameters == 4 * 8 * 128
    # a step has two rows of 15 tokens: 12 text tokens, two of them supervised, and 18 visual ones
    assert math.isclose(taken.duration_s or 0, 150 * (0.5 + 12 * 0.01 + 18 * 0.02 + 2 * 0.1 + 2 * 15**2 * 0.001))
    # the longest row is twice the mean, 12 text and 18 visual tokens, and both rows of a step are one pass
    assert taken.peak_memory_bytes == 1000 + 2 * (12 * 10 + 18 * 20)
    assert (taken.worker_class, taken.available_memory_bytes, taken.fits) == ("cpu-2x", 10_000, True)


def test_a_job_takes_the_memory_of_loading_its_base_at_least() -> None:
    costs = dataclasses.replace(
        COSTS, least_memory_bytes=5000, kept_bytes_per_visual_token=1.0, kept_bytes_limit=10_000
    )
    taken = estimate(SPEC, BASE, SPLIT, [dataclasses.replace(WORKER, calibrations=(costs,))])
    assert taken.peak_memory_bytes == 5000 + 900


def test_several_ranks_share_the_rows_of_a_step() -> None:
    spec = dataclasses.replace(SPEC, batch_size=3, gradient_accumulation=1)
    taken = estimate(spec, BASE, SPLIT, [dataclasses.replace(WORKER, ranks=2)])
    assert taken.steps == 3 * 34  # as on one rank
    # the first rank has two of the three rows
    assert math.isclose(taken.duration_s or 0, 102 * (0.5 + 12 * 0.01 + 18 * 0.02 + 2 * 0.1 + 2 * 15**2 * 0.001))
    assert taken.peak_memory_bytes == 1000 + 2 * (12 * 10 + 18 * 20)


def test_steps_instead_of_epochs_bound_the_tokens() -> None:
    taken = estimate(dataclasses.replace(SPEC, epochs=None, steps=10), BASE, SPLIT, [WORKER])
    assert (taken.steps, taken.total_tokens) == (10, 300)


def test_what_was_neither_counted_nor_measured_stays_unknown() -> None:
    uncounted = estimate(SPEC, BASE, SplitFacts(100), [WORKER])
    assert (uncounted.steps, uncounted.total_tokens, uncounted.duration_s) == (150, None, None)
    assert uncounted.worker_class == "cpu-2x"
    unmeasured = estimate(SPEC, BASE, SPLIT, [dataclasses.replace(WORKER, calibrations=())])
    assert (unmeasured.total_tokens, unmeasured.duration_s, unmeasured.fits) == (4500, None, True)
    nobody = estimate(SPEC, BASE, SPLIT, [])
    assert (nobody.worker_class, nobody.fits) == ("", True)


def test_only_workers_with_base_and_dtype_count() -> None:
    other = dataclasses.replace(WORKER, models={"models/m": "another digest"})
    assert estimate(SPEC, BASE, SPLIT, [other]).worker_class == ""
    bf16 = dataclasses.replace(SPEC, dtype=Dtype.BFLOAT16)
    assert estimate(bf16, BASE, SPLIT, [WORKER]).duration_s is None


def test_a_job_costs_what_the_nearest_in_its_linears_does_then_in_rank() -> None:
    decoder = {f"layers.0.{name}": Linear("decoder", 64, 64) for name in ("q_proj", "k_proj", "v_proj")}
    base = dataclasses.replace(BASE, linears=decoder | {"visual.qkv": Linear("vision", 64, 64)})
    shapes = (("q_proj",), 8), (("q_proj",), 32), (("q_proj", "k_proj", "v_proj"), 8), (("q_proj", "qkv"), 8)
    measured = []
    for number, (names, rank) in enumerate(shapes):
        whole = tuple(sorted(name for name in base.linears if name.rpartition(".")[2] in names))
        seconds = StepCost(float(number), 0, 0, 0)
        measured.append(dataclasses.replace(COSTS, target_modules=whole, rank=rank, seconds=seconds))
    worker = dataclasses.replace(WORKER, calibrations=tuple(measured))

    def taken(*names: str, rank: int) -> float:
        spec = dataclasses.replace(SPEC, epochs=None, steps=1, lora=Lora(rank=rank, target_modules=names))
        return estimate(spec, base, SPLIT, [worker]).duration_s or 0

    assert taken("q_proj", rank=8) == 0
    assert taken("q_proj", rank=64) == 1  # though all linears of the decoder at rank 8 have more of its parameters
    assert taken("k_proj", "v_proj", rank=8) == 2
    assert taken("k_proj", "v_proj", "qkv", rank=8) == 3  # the only one with a tower that learns


def test_the_sooner_class_that_fits_is_taken() -> None:
    fast = dataclasses.replace(COSTS, seconds=StepCost(0.1, 0, 0, 0))
    small = dataclasses.replace(WORKER, name="s", worker_class="small", memory_bytes=10, calibrations=(fast,))
    quick = dataclasses.replace(WORKER, name="q", worker_class="quick", calibrations=(fast,))
    assert estimate(SPEC, BASE, SPLIT, [WORKER, small, quick]).worker_class == "quick"


def test_what_does_not_fit_is_told_with_changes_that_would() -> None:
    spec = dataclasses.replace(SPEC, batch_size=8, max_pixels=40_000)
    tight = dataclasses.replace(WORKER, memory_bytes=3_200)
    taken = estimate(spec, BASE, SPLIT, [tight])
    assert taken.peak_memory_bytes == 1000 + 16 * 480
    assert not taken.fits
    assert taken.suggestions == ("batch_size=2", "max_pixels=1250")


def test_a_pass_is_bounded_unless_a_batch_alone_is_longer() -> None:
    long = dataclasses.replace(SPLIT, longest_row=1500)
    accumulated = estimate(dataclasses.replace(SPEC, gradient_accumulation=8), BASE, long, [WORKER])
    assert accumulated.peak_memory_bytes == 1000 + math.ceil(PASS_TOKENS * 0.4 * 10 + PASS_TOKENS * 0.6 * 20)
    batch = estimate(dataclasses.replace(SPEC, batch_size=2), BASE, long, [WORKER])
    assert batch.peak_memory_bytes == 1000 + 1200 * 10 + 1800 * 20


def test_a_frozen_tower_sees_each_picture_once_and_what_is_kept_takes_memory() -> None:
    costs = dataclasses.replace(
        COSTS, tower_seconds_per_visual_token=0.3, kept_bytes_per_visual_token=4.0, kept_bytes_limit=2500
    )
    plain = estimate(SPEC, BASE, SPLIT, [WORKER])
    taken = estimate(SPEC, BASE, SPLIT, [dataclasses.replace(WORKER, calibrations=(costs,))])
    assert math.isclose(taken.duration_s or 0, (plain.duration_s or 0) + 900 * 0.3)
    assert taken.peak_memory_bytes == (plain.peak_memory_bytes or 0) + 2500
    few = dataclasses.replace(SPEC, epochs=None, steps=10)
    short = estimate(few, BASE, SPLIT, [dataclasses.replace(WORKER, calibrations=(costs,))])
    assert math.isclose(short.duration_s or 0, 10 * (plain.duration_s or 0) / 150 + 180 * 0.3)


def test_a_merger_that_learns_has_the_frozen_tower_see_pictures_in_every_step() -> None:
    linears = LINEARS | {"visual.merger": Linear("merger", 64, 64), "visual.qkv": Linear("vision", 64, 64)}
    frozen = dataclasses.replace(COSTS, tower_seconds_per_visual_token=0.3)
    learning = dataclasses.replace(COSTS, target_modules=tuple(sorted(linears)), seconds=StepCost(1000, 0, 0, 0))
    worker = dataclasses.replace(WORKER, calibrations=(learning, frozen))
    base = dataclasses.replace(BASE, linears=linears)
    spec = dataclasses.replace(SPEC, lora=Lora(target_modules=("q_proj", "v_proj", "merger")))
    plain = estimate(SPEC, BASE, SPLIT, [WORKER])
    assert math.isclose(estimate(spec, base, SPLIT, [worker]).duration_s or 0, (plain.duration_s or 0) + 150 * 18 * 0.3)


@given(st.integers(1, 10**6), st.integers(1, 100), st.integers(1, 64), st.integers(1, 64))
def test_an_epoch_takes_every_row_and_no_step_is_empty(rows: int, epochs: int, batch: int, accumulated: int) -> None:
    spec = dataclasses.replace(SPEC, epochs=epochs, batch_size=batch, gradient_accumulation=accumulated)
    steps = total_steps(spec, rows) // epochs
    assert (steps - 1) * batch * accumulated < rows <= steps * batch * accumulated
