"""What a spec means: steps, rates, targets."""

import itertools
from typing import Any

import pytest
import torch

from veneer.trainer.v1 import model_pb2, training_job_pb2
from veneer_rpc.errors import InvalidArgument
from veneer_trainer.worker.loop.plan import sealed
from veneer_trainer.worker.refusal import Refused
from veneer_vlm import native

Bench = Any  # the fixture's class in conftest.py


def test_the_last_step_of_an_epoch_may_have_fewer_rows(bench: Bench) -> None:
    plan = bench.plan(epochs=3, batch_size=2, gradient_accumulation=2)
    assert [plan.total_steps(rows) for rows in (1, 4, 5, 8)] == [3, 3, 6, 6]
    assert bench.plan(steps=7).total_steps(1000) == 7


@pytest.mark.parametrize(
    ("schedule", "half", "last"),
    [("SCHEDULE_COSINE", 0.5, 0.0), ("SCHEDULE_LINEAR", 0.5, 0.0), ("SCHEDULE_CONSTANT", 1.0, 1.0)],
)
def test_the_rate_grows_over_the_warm_up_then_follows_its_schedule(
    bench: Bench, schedule: str, half: float, last: float
) -> None:
    plan = bench.plan(optimizer={"learning_rate": 0.1, "warmup_ratio": 0.2, "schedule": schedule})
    rates = [plan.learning_rate(step, 100) for step in range(100)]
    assert rates[:20] == pytest.approx([0.1 * (step + 1) / 20 for step in range(20)])
    assert rates[20] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.1 * half)
    assert rates[99] == pytest.approx(0.1 * last, abs=0.002)
    assert all(left >= right for left, right in itertools.pairwise(rates[20:]))


def test_targets_are_written_as_people_write_them_where_that_says_the_same(bench: Bench) -> None:
    assert bench.plan(lora={"target_modules": ["attention"]}).adapter.target_modules == ("q_proj", "v_proj")
    whole = bench.plan(lora={"target_modules": ["decoder+merger+vision"]})
    assert set(whole.adapter.target_modules) == set(whole.target_modules)
    assert whole.trains_tower
    assert bench.plan(lora={"target_modules": ["decoder+merger"]}).trains_tower
    assert not bench.plan(lora={"target_modules": ["decoder"]}).trains_tower


def test_dtypes(bench: Bench) -> None:
    assert bench.plan(dtype="DTYPE_FLOAT32").dtype == torch.float32
    assert bench.plan(dtype="DTYPE_BFLOAT16").dtype == torch.bfloat16
    assert bench.plan(dtype="DTYPE_AUTO").dtype in (torch.float32, torch.bfloat16)


def test_what_the_first_attempt_decided_stays(bench: Bench) -> None:
    job = training_job_pb2.TrainingJob(spec=training_job_pb2.TrainingSpec(dtype="DTYPE_AUTO", seed=3))
    assert sealed(job) == job.spec
    job.resolved.dtype = model_pb2.DTYPE_BFLOAT16
    assert (sealed(job).dtype, sealed(job).seed) == (model_pb2.DTYPE_BFLOAT16, 3)
    assert job.spec.dtype == model_pb2.DTYPE_AUTO


def test_what_this_worker_does_not_do_is_refused(bench: Bench) -> None:
    with pytest.raises(Refused, match=r"spec\.lora\.use_dora"):
        bench.plan(lora={"use_dora": True})
    with pytest.raises(InvalidArgument, match="matches no linear"):
        bench.plan(lora={"target_modules": ["nothing"]})


def test_a_record_says_by_what_a_job_was_computed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled library the last bits are others than with torch's own calls."""
    records = []
    for available, multiplies in ((True, torch.bfloat16), (True, torch.float32), (True, None), (False, None)):
        monkeypatch.setattr(native, "AVAILABLE", available)
        for dtype in (torch.bfloat16, torch.float32):
            monkeypatch.setitem(native.MULTIPLIES, dtype, dtype is multiplies)
        records.append(bench.plan().numerics(1))
    *with_library, without = records
    assert len({record["instructions"] for record in records}) == 4
    assert all({name for name in each if each[name] != without[name]} == {"instructions"} for each in with_library)
    assert without["instructions"] == torch.backends.cpu.get_cpu_capability()
