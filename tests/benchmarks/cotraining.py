"""T2 and T3: eight LoRA jobs in shared passes, against the same jobs one after another; interleaved in one run.

    python tests/benchmarks/cotraining.py DIR [--dtype bfloat16|float32] [--device cpu|cuda] [--jobs 8]

One optimiser step of every job, at the service's defaults of one row twice accumulated: T2 with rows of each job's
own, T3 (a sweep) with the same rows for all. Frozen features are kept on both sides. `training.py` gives the ratio of
one job against transformers and PEFT in its own run; the product of both is the makespan's against PEFT one after
another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from training import settle

from veneer.trainer.v1 import training_job_pb2
from veneer_processing import Conversation, Message, Picture, Processor, Text
from veneer_trainer.worker.loop.base import load_base
from veneer_trainer.worker.loop.batches import Batches, Step
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_trainer.worker.loop.learner import Learner, Turn, learn_together
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.rows import Row
from veneer_trainer.worker.loop.run import processor_under
from veneer_trainer.worker.loop.state import State
from veneer_vlm.config import ModelConfig

SIDE, PROMPT_WORDS, ANSWER_WORDS = 448, 50, 72
RATE = 1e-4


def spec(job: int, dtype: str) -> training_job_pb2.TrainingSpec:
    return training_job_pb2.TrainingSpec(
        model="models/bench", steps=1, batch_size=1, gradient_accumulation=2, max_length=1024, seed=job,
        max_pixels=SIDE * SIDE, dtype=f"DTYPE_{dtype.upper()}",
        lora={"rank": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": ["decoder"]},
        optimizer={"learning_rate": RATE, "beta1": 0.9, "beta2": 0.999, "max_gradient_norm": 1.0},
    )  # fmt: skip


def row(processor: Processor, number: int) -> Row:
    rgb = np.random.default_rng(number).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    picture = Picture.resized(hashlib.sha256(rgb.tobytes()).hexdigest(), rgb)
    question = Message("user", (picture, Text(" word" * PROMPT_WORDS)))
    conversation = Conversation((question, Message("assistant", (Text(" word" * ANSWER_WORDS),))))
    return Row(processor.encode(conversation, with_patches=False), (picture,))


def turns(learners: Sequence[Learner], steps: Sequence[Step]) -> list[Turn]:
    return [Turn(learner, step, RATE) for learner, step in zip(learners, steps, strict=True)]


def measured(directory: Path, dtype: str, device: str, jobs: int, runs: int, shared_rows: bool) -> dict[str, float]:
    """Seconds of a step of all jobs, in turn and together."""
    config = ModelConfig.from_directory(directory)
    plans = [Plan.of(spec(job, dtype), config, device=device) for job in range(jobs)]
    model = load_base(directory, plans[0].dtype, device)
    processor = processor_under(directory, "0" * 64, SIDE * SIDE)
    features = FrozenFeatures(model, 4 << 30)
    learners = [Learner(model, State.fresh(config, plan), plan, features) for plan in plans]
    steps = []
    for job, plan in enumerate(plans):
        first = 0 if shared_rows else 2 * job
        batches = Batches(processor, plan, features.known)
        steps.append(batches.step([row(processor, first), row(processor, first + 1)]))
    apart, together = [], []
    for _ in range(runs + 1):  # the first warms up: pictures go through the tower
        began_s = time.perf_counter()
        for each in turns(learners, steps):
            learn_together([each])
        settle(device)
        apart.append(time.perf_counter() - began_s)
        began_s = time.perf_counter()
        learn_together(turns(learners, steps))
        settle(device)
        together.append(time.perf_counter() - began_s)
    ratios = [alone / shared for alone, shared in zip(apart[1:], together[1:], strict=True)]
    return {
        "apart_s": statistics.median(apart[1:]),
        "together_s": statistics.median(together[1:]),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_greatest": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    found = {
        name: measured(told.directory, told.dtype, told.device, told.jobs, told.runs, shared_rows)
        for name, shared_rows in (("T2", False), ("T3", True))
    }
    if told.json:
        print(json.dumps(found))
        return
    for name, figures in found.items():
        print(name, "  ".join(f"{figure} {value:,.3f}" for figure, value in figures.items()))


if __name__ == "__main__":
    main()
