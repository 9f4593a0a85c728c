"""Training on a GPU learns what it learns on the CPU, goes on from its own checkpoints, and shares passes."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer.trainer.v1 import training_job_pb2, worker_service_pb2
from veneer_base.unfold import base_directory
from veneer_processing import Conversation, Message, Picture, Text
from veneer_trainer.worker.device import find
from veneer_trainer.worker.loop.batches import Batches, Step
from veneer_trainer.worker.loop.calibration import measure
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_trainer.worker.loop.gauges import free_memory_bytes, peak_memory_bytes
from veneer_trainer.worker.loop.learner import Learner, Turn, learn_together
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.rows import Row
from veneer_trainer.worker.loop.run import processor_under
from veneer_trainer.worker.loop.state import State
from veneer_trainer.worker.messages import Measure
from veneer_vlm.config import ModelConfig
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.peft_folder import read, write
from veneer_vlm.weights import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; this machine has none"),
]
PIXELS = 64 * 96
STEPS = 8
RATE = 2e-3
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # relative


def spec(dtype: str, dropout: float = 0.0, **values: Any) -> training_job_pb2.TrainingSpec:  # noqa: ANN401
    return training_job_pb2.TrainingSpec(
        model="models/base", steps=STEPS, batch_size=2, gradient_accumulation=2, max_pixels=PIXELS, max_length=512,
        dtype=f"DTYPE_{dtype.upper()}",
        lora={"rank": 8, "alpha": 16.0, "dropout": dropout, "target_modules": ["decoder+merger+vision"]} | values,
        optimizer={"learning_rate": RATE, "beta1": 0.9, "beta2": 0.999, "max_gradient_norm": 1.0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Path:
    return base_directory()


Loaded = Callable[[str, str], VisionLanguageModel]


@pytest.fixture(scope="module")
def loaded(base: Path) -> Loaded:
    """The base in a dtype on a device, loaded once each."""
    models: dict[tuple[str, str], VisionLanguageModel] = {}

    def model(dtype: str, device: str) -> VisionLanguageModel:
        if (dtype, device) not in models:
            models[dtype, device] = load(base, getattr(torch, dtype), device)
        return models[dtype, device]

    return model


class Run:
    """A job's steps on the same four rows."""

    def __init__(self, model: VisionLanguageModel, base: Path, told: training_job_pb2.TrainingSpec) -> None:
        self.config = ModelConfig.from_directory(base)
        self.plan = Plan.of(told, self.config, device=model.device.type)
        self.state = State.fresh(self.config, self.plan)
        features = None if self.plan.trains_tower else FrozenFeatures(model, 1 << 30)
        self.learner = Learner(model, self.state, self.plan, features)
        self.processor = processor_under(base, "0" * 64, PIXELS)

    def step(self) -> Step:
        rows = []
        for number in range(4):
            rgb = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
            picture = Picture.resized(hashlib.sha256(rgb.tobytes()).hexdigest(), rgb)
            asked = Message("user", (picture, Text("What number?")))
            answered = Message("assistant", (Text(f"Number {number * 37}."),))
            rows.append(Row(self.processor.encode(Conversation((asked, answered)), with_patches=False), (picture,)))
        features = self.learner.features
        return Batches(self.processor, self.plan, features.known if features else lambda sha256: None).step(rows)

    def learn(self, steps: int = STEPS) -> list[float]:
        losses = []
        for _ in range(steps):
            self.learner.learn(self.step(), RATE)
            losses.append(self.state.figures.loss)
        return losses

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state.adapter.tensors()}


@pytest.mark.parametrize("targets", [["decoder+merger+vision"], ["attention"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_on_cuda_are_those_on_the_cpu(base: Path, loaded: Loaded, dtype: str, targets: list[str]) -> None:
    told = spec(dtype, target_modules=targets)
    here, there = (Run(loaded(dtype, device), base, told).learn() for device in ("cuda", "cpu"))
    assert here == pytest.approx(there, rel=LOSS_TOLERANCE[dtype])
    assert here[-1] < 0.9 * here[0]


@pytest.mark.parametrize("resumed_on", ["cuda", "cpu"])
def test_a_checkpoint_goes_on_on_either_device(base: Path, loaded: Loaded, tmp_path: Path, resumed_on: str) -> None:
    whole = Run(loaded("float32", "cuda"), base, spec("float32"))
    losses = whole.learn()
    first = Run(loaded("float32", "cuda"), base, spec("float32"))
    first.learn(STEPS // 2)
    first.state.save(tmp_path / "checkpoint")
    rest = Run(loaded("float32", resumed_on), base, spec("float32"))
    rest.state.restore(tmp_path / "checkpoint")
    assert rest.learn(STEPS - STEPS // 2) == pytest.approx(losses[STEPS // 2 :], rel=1e-3)
    assert all(tensor.device.type == resumed_on for _, tensor in rest.state.adapter.tensors())


def test_dropout_masks_are_the_same_in_a_second_run(base: Path, loaded: Loaded) -> None:
    runs = [Run(loaded("float32", "cuda"), base, spec("float32", dropout=0.3)) for _ in range(2)]
    first, again = (run.learn() for run in runs)
    assert first == pytest.approx(again, rel=1e-5)
    assert first != Run(loaded("float32", "cuda"), base, spec("float32")).learn()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_jobs_together_learn_what_each_learns_alone(base: Path, loaded: Loaded, dtype: str, tolerance: float) -> None:
    model = loaded(dtype, "cuda")
    specs = [spec(dtype, dropout=0.1, rank=rank, target_modules=["decoder"]) for rank in (4, 8, 16)]
    alone = [Run(model, base, told).learn() for told in specs]
    runs = [Run(model, base, told) for told in specs]
    together: list[list[float]] = [[] for _ in runs]
    for _ in range(STEPS):
        assert learn_together([Turn(run.learner, run.step(), RATE) for run in runs]) == [None] * len(runs)
        for losses, run in zip(together, runs, strict=True):
            losses.append(run.state.figures.loss)
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, rel=tolerance)


def test_an_adapter_from_cuda_is_a_peft_folder(base: Path, loaded: Loaded, tmp_path: Path) -> None:
    run = Run(loaded("bfloat16", "cuda"), base, spec("bfloat16"))
    run.learn(2)
    write(run.state.adapter, tmp_path / "adapter")
    found = dict(read(tmp_path / "adapter", run.config).tensors())
    assert all(torch.equal(found[name], tensor) for name, tensor in run.weights().items())


def test_the_device_is_found_and_measured(base: Path) -> None:
    device = find("auto", 2)
    assert (device.kind, device) == ("cuda", find("cuda", 2))
    assert device.worker_class.startswith("cuda-")
    assert free_memory_bytes("cuda") <= device.memory_bytes
    told = spec("bfloat16", dropout=0.05, target_modules=["decoder"])
    task = Measure(told.SerializeToString(), str(base), "0" * 64, "cuda", 2, 1 << 20)
    found = measure(task)
    assert isinstance(found, worker_service_pb2.Calibration)
    assert 0 < found.memory_bytes.fixed + 512 * found.memory_bytes.per_text_token < device.memory_bytes
    assert found.seconds.fixed + 512 * found.seconds.per_text_token > 0
    assert found.gemm_flops_per_s > 1e12
    assert 0 < peak_memory_bytes("cuda") < device.memory_bytes
