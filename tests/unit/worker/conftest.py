"""A tiny random base, rows on it, and runs of the loop without services."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veneer.trainer.v1 import training_job_pb2
from veneer_processing import Conversation, Picture, Processor, Text
from veneer_processing import Message as Said
from veneer_trainer.worker.loop.batches import Batches, Step
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_trainer.worker.loop.learner import Learner
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.rows import Row
from veneer_trainer.worker.loop.run import processor_under
from veneer_trainer.worker.loop.state import State
from veneer_vlm.config import ModelConfig
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.weights import load

Message = Any  # fields of a spec
PIXELS = 64 * 96


def spec(**values: Message) -> training_job_pb2.TrainingSpec:
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["attention"]} | values.pop("lora", {})
    optimizer = {
        "learning_rate": 1e-2, "warmup_ratio": 0.0, "beta1": 0.9, "beta2": 0.999, "max_gradient_norm": 1.0,
    } | values.pop("optimizer", {})  # fmt: skip
    chosen = {
        "model": "models/tiny", "epochs": 1, "batch_size": 2, "gradient_accumulation": 2, "seed": 3,
        "dtype": "DTYPE_FLOAT32", "max_pixels": PIXELS, "max_length": 512,
    } | values  # fmt: skip
    if "steps" in values:
        del chosen["epochs"]
    return training_job_pb2.TrainingSpec(lora=lora, optimizer=optimizer, **chosen)


class Bench:
    """The base and what runs on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = ModelConfig.from_directory(directory)
        self.model: VisionLanguageModel = load(directory)
        self.processor: Processor = processor_under(directory, "0" * 64, PIXELS)

    def plan(self, **values: Message) -> Plan:
        return Plan.of(spec(**values), self.config)

    def row(self, number: int, answer: str = "", prompt: str = "What number?", pictures: int = 1) -> Row:
        seen = []
        for each in range(pictures):
            rgb = np.random.default_rng(100 * number + each).integers(0, 255, (64, 64, 3), np.uint8)
            seen.append(Picture.resized(hashlib.sha256(rgb.tobytes()).hexdigest(), rgb))
        question = Said("user", (*seen, Text(prompt)))
        reply = Said("assistant", (Text(answer or f"Number {number * 37}."),))
        encoded = self.processor.encode(Conversation((question, reply)), with_patches=False)
        return Row(encoded, tuple(seen))

    def rows(self, count: int = 4) -> list[Row]:
        return [self.row(number) for number in range(count)]

    def steps(self, plan: Plan, rows: Sequence[Row]) -> list[Step]:
        batches = Batches(self.processor, plan, lambda sha256: None)
        size = plan.rows_per_step
        return [batches.step(rows[start : start + size]) for start in range(0, len(rows), size)]

    def run(self, **values: Message) -> "Run":
        return Run(self, self.plan(**values))


class Run:
    """A run, step by step."""

    def __init__(self, bench: Bench, plan: Plan) -> None:
        self.bench, self.plan = bench, plan
        self.state = State.fresh(bench.config, plan)
        self.features = None if plan.trains_tower else FrozenFeatures(bench.model, 1 << 30)
        self.learner = Learner(bench.model, self.state, plan, self.features)

    def learn(self, rows: Sequence[Row], rate: float = 1e-2) -> None:
        for step in self.bench.steps(self.plan, rows):
            self.learner.learn(step, rate)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.state.adapter.tensors()}

    def gradients(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The first step's gradients, as AdamW's first moment keeps them (a tenth)."""
        self.learn(rows)
        return {
            name: self.state.optimizer.state[tensor]["exp_avg"].clone() for name, tensor in self.state.adapter.tensors()
        }


@pytest.fixture(scope="session")
def bench(byte_base: Path) -> Bench:
    torch.set_num_threads(1)
    return Bench(byte_base)
