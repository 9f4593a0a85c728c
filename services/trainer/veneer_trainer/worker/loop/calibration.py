"""What training one shape of job costs on this machine: measured on made-up rows, the same steps that jobs take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from veneer.trainer.v1 import model_pb2, training_job_pb2, worker_service_pb2
from veneer_processing import Processor
from veneer_trainer.worker.loop.base import load_base
from veneer_trainer.worker.loop.batches import Pass, Seen, Step
from veneer_trainer.worker.loop.features import FrozenFeatures
from veneer_trainer.worker.loop.gauges import peak_memory_bytes, reset_peak_memory
from veneer_trainer.worker.loop.learner import Learner
from veneer_trainer.worker.loop.plan import Plan
from veneer_trainer.worker.loop.state import State
from veneer_trainer.worker.messages import Measure
from veneer_vlm.config import ModelConfig, VisionConfig
from veneer_vlm.loss import CHUNK
from veneer_vlm.model import VisionLanguageModel

_RATE = 1e-4
_LONG_ENOUGH_S = 0.2  # a quicker step is taken again: its least time counts
_MOST_TIMES = 9
_ROUNDS = 3
_GEMM_SIDE = 1024


@dataclass(frozen=True, slots=True)
class _Load:
    """Tokens of a made-up step; supervised ones are among the text tokens, and `rows` are equally long."""

    text: int
    visual: int
    supervised: int
    rows: int

    @property
    def pairs(self) -> int:
        """Of tokens of one row."""
        return (self.text + self.visual) ** 2 // self.rows


# Apart in one figure each, but for pairs, and within what a job's own step has: what is measured is not stretched
# far. Each has the logits of a whole chunk, for more of them take no more memory.
_SMALL, _TEXT, _LONG = _Load(192, 0, CHUNK, 1), _Load(512, 0, CHUNK, 4), _Load(512, 0, CHUNK, 1)
_VISUAL, _SUPERVISED = _Load(512, 256, CHUNK, 3), _Load(512, 0, 3 * CHUNK, 4)


@dataclass(frozen=True, slots=True)
class _Cost:
    seconds: float
    memory_bytes: float


def measure(task: Measure) -> worker_service_pb2.Calibration:
    """Measures a shape of job on a base.

    Raises:
        Refused, InvalidArgument, TargetError: the base does not take it.
        ConfigError, WeightsError: the base cannot be loaded.
    """
    torch.set_num_threads(task.threads)
    spec = training_job_pb2.TrainingSpec.FromString(task.spec)
    config = ModelConfig.from_directory(Path(task.model_directory))
    plan = Plan.of(spec, config, device=task.device)
    processor = Processor.load(Path(task.model_directory), task.model_digest)
    model = load_base(Path(task.model_directory), plan.dtype, task.device)
    trial = _Trial(model, plan, config, processor)
    loaded_bytes = peak_memory_bytes(task.device)
    first = trial.cost(_SMALL)  # it makes what later ones find
    # In turns, for the machine's pace changes: only what was measured in the same seconds can be compared.
    loads = _SMALL, _TEXT, _LONG, _VISUAL, _SUPERVISED
    rounds = [[trial.cost(each) for each in loads] for _ in range(_ROUNDS)]
    costs = dict(zip(loads, (_least(each) for each in zip(*rounds, strict=True)), strict=True))
    per_pair_s = _slope(costs[_TEXT].seconds, costs[_LONG].seconds, _LONG.pairs - _TEXT.pairs)

    def line(of: Callable[[_Cost], float], per_pair: float) -> worker_service_pb2.StepCost:
        small, text, visual, supervised = (
            of(costs[load]) - per_pair * load.pairs for load in (_SMALL, _TEXT, _VISUAL, _SUPERVISED)
        )
        per_text = _slope(small, text, _TEXT.text - _SMALL.text)
        per_supervised = _slope(text, supervised, _SUPERVISED.supervised - _TEXT.supervised)
        return worker_service_pb2.StepCost(
            fixed=max(0.0, small - per_text * _SMALL.text - per_supervised * _SMALL.supervised),
            per_text_token=per_text,
            per_visual_token=_slope(text, visual, _VISUAL.visual),
            per_supervised_token=per_supervised,
            per_token_pair=per_pair,
        )

    measured = worker_service_pb2.Calibration(
        model_digest=task.model_digest,
        dtype=model_pb2.DTYPE_BFLOAT16 if plan.dtype is torch.bfloat16 else model_pb2.DTYPE_FLOAT32,
        target_modules=plan.target_modules,
        rank=spec.lora.rank,
        seconds=line(lambda cost: cost.seconds, per_pair_s),
        memory_bytes=line(lambda cost: cost.memory_bytes, 0.0),  # attention keeps nothing of a pair
        gemm_flops_per_s=gemm_flops_per_s(plan.dtype, plan.device),
        kept_bytes_per_visual_token=_kept_bytes(config, plan),
        kept_bytes_limit=2 * task.cache_bytes,  # rows, and features again
        least_memory_bytes=round(max(loaded_bytes, first.memory_bytes)),
    )
    if not plan.trains_tower:
        measured.tower_seconds_per_visual_token = trial.tower_seconds() / _VISUAL.visual
    measured.measure_time.FromNanoseconds(time.time_ns())
    return measured


def gemm_flops_per_s(dtype: torch.dtype, device: str) -> float:
    """The best rate of a product of square matrices, in FLOP/s: what this machine gives in this minute."""
    left, right = (torch.ones(_GEMM_SIDE, _GEMM_SIDE, dtype=dtype, device=device) for _ in range(2))
    seconds = _least_seconds(lambda: torch.mm(left, right), device)
    return float(2 * _GEMM_SIDE**3 / seconds)


class _Trial:
    """A job of the shape on made-up rows.

    It has in memory what a job has: beside a small base a tokenizer takes more than the weights.
    """

    def __init__(self, model: VisionLanguageModel, plan: Plan, config: ModelConfig, processor: Processor) -> None:
        self._processor = processor
        self._model = model
        self._config = config
        self._features = None if plan.trains_tower else FrozenFeatures(model, 1 << 30)
        self._device = plan.device
        self._learner = Learner(model, State.fresh(config, plan), plan, self._features)

    def cost(self, load: _Load) -> _Cost:
        """What a step costs, with the features of its picture known where the tower is frozen."""
        step = self._step(load)
        if self._features is not None:
            self._features.of(step.passes[0].pictures)
        reset_peak_memory(self._device)
        seconds = _least_seconds(lambda: self._learner.learn(step, _RATE), self._device)
        return _Cost(seconds, peak_memory_bytes(self._device))

    def tower_seconds(self) -> float:
        """The frozen tower's time for one picture."""
        (picture,) = self._step(_VISUAL).passes[0].pictures
        patches_P_X = picture.patches_P_X
        if patches_P_X is None:
            raise ValueError("a made-up picture comes with its patches")
        model = self._model
        with torch.no_grad():
            seconds = _least_seconds(
                lambda: model.see(patches_P_X.to(model.device, model.dtype), [picture.grid]), self._device
            )
        return seconds

    def _step(self, load: _Load) -> Step:
        tokens = load.text + load.visual
        ids_T = torch.arange(tokens) % 100
        ids_T[: load.visual] = self._config.image_token_id
        predicting_N = torch.arange(tokens - 1 - load.supervised, tokens - 1)
        pictures = (_picture(self._config.vision, load.visual),) if load.visual else ()
        row = tokens // load.rows
        positions_3_T = torch.arange(row).repeat(load.rows).expand(3, -1)
        each = Pass(0, ids_T, positions_3_T, (row,) * load.rows, predicting_N, ids_T[predicting_N + 1], pictures)
        return Step((each,), 1, tokens)


def _picture(config: VisionConfig, visual: int) -> Seen:
    merge, side = config.spatial_merge_size, math.isqrt(visual)
    grid = (1, side * merge, side * merge)
    return Seen("0" * 64, grid, torch.zeros(math.prod(grid), config.patch_values))


def _least(costs: Sequence[_Cost]) -> _Cost:
    return _Cost(min(each.seconds for each in costs), min(each.memory_bytes for each in costs))


def _slope(low: float, high: float, count: int) -> float:
    return max(0.0, high - low) / count


def _kept_bytes(config: ModelConfig, plan: Plan) -> float:
    """Bytes of features and pixels per visual token."""
    vision = config.vision
    levels = 0 if plan.trains_tower else 1 + len(vision.deepstack_visual_indexes)
    pixels = 3 * (vision.patch_size * vision.spatial_merge_size) ** 2
    return levels * config.text.hidden_size * plan.dtype.itemsize + pixels


def _least_seconds(act: Callable[[], object], device: str) -> float:
    """The least time of several that an act takes on a device."""
    least, spent, times = math.inf, 0.0, 0
    while times == 0 or (spent < _LONG_ENOUGH_S and times < _MOST_TIMES):
        began_s = time.perf_counter()
        act()
        if device != "cpu":
            torch.cuda.synchronize()
        took_s = time.perf_counter() - began_s
        least, spent, times = min(least, took_s), spent + took_s, times + 1
    return least
