"""What a job's spec means on this base and this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch

from veneer.trainer.v1 import model_pb2, training_job_pb2
from veneer_trainer.domain.estimate import PASS_TOKENS
from veneer_trainer.domain.spec import Lora
from veneer_trainer.domain.targets import Linear, targeted
from veneer_trainer.worker.refusal import Refused
from veneer_vlm import bfloat16, native
from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import TargetError
from veneer_vlm.layout import DECODER, TOWER, adaptable_linears, target_linears
from veneer_vlm.lora import AdapterConfig

_VISION_LAYERS = f"{TOWER}blocks."


@dataclasses.dataclass(frozen=True)
class Plan:
    """A spec, read.

    Attributes:
        spec: as it was sent, every default filled in.
        rows_per_step: batch size times accumulation, however many ranks share them.
        adapter: of the adapter to train.
        target_modules: whole names of the adapted linears, sorted.
        trains_tower: whether features of pictures change with the adapter.
        dtype: of the base.
        device: that computes, "cpu" or "cuda".
    """

    spec: training_job_pb2.TrainingSpec
    rows_per_step: int
    adapter: AdapterConfig
    target_modules: tuple[str, ...]
    trains_tower: bool
    dtype: torch.dtype
    device: str = "cpu"

    @classmethod
    def of(cls, spec: training_job_pb2.TrainingSpec, config: ModelConfig, device: str = "cpu") -> Plan:
        """Reads a spec for a base and a device.

        Raises:
            Refused: it asks for what this worker does not do.
            InvalidArgument, TargetError: targets or rank do not fit the base.
        """
        lora = spec.lora
        if lora.use_dora:
            raise Refused("DORA_UNSUPPORTED", "spec.lora.use_dora: this worker trains plain LoRA only")
        linears = {name: Linear(_group(name), *shape) for name, shape in adaptable_linears(config).items()}
        names = tuple(targeted(linears, Lora(rank=lora.rank, target_modules=tuple(lora.target_modules))))
        adapter = AdapterConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=_shortest(config, names),
            use_rslora=lora.use_rslora,
            base_model_name_or_path=spec.model,
        )
        return cls(
            spec,
            spec.batch_size * spec.gradient_accumulation,
            adapter,
            names,
            any(name.startswith(TOWER) for name in names),
            _dtype(spec.dtype, device),
            device,
        )

    def steps_per_epoch(self, rows: int) -> int:
        """Optimiser steps of an epoch; the last may have fewer rows."""
        return math.ceil(rows / self.rows_per_step)

    def total_steps(self, rows: int) -> int:
        """Optimiser steps of the job."""
        if self.spec.WhichOneof("length") == "steps":
            return self.spec.steps
        return self.spec.epochs * self.steps_per_epoch(rows)

    def learning_rate(self, step: int, total_steps: int) -> float:
        """The rate of a step, from 0: a straight line up over the warm-up, then the schedule.

        The first step has the first share of the line, not 0: no step is wasted.
        """
        optimizer = self.spec.optimizer
        warm_up = round(optimizer.warmup_ratio * total_steps)
        if step < warm_up:
            return optimizer.learning_rate * (step + 1) / warm_up
        done = (step - warm_up) / max(total_steps - warm_up, 1)
        match optimizer.schedule:
            case training_job_pb2.SCHEDULE_CONSTANT:
                share = 1.0
            case training_job_pb2.SCHEDULE_LINEAR:
                share = 1 - done
            case _:
                share = 0.5 * (1 + math.cos(math.pi * done))
        return optimizer.learning_rate * share

    def numerics(self, threads: int) -> Mapping[str, str]:
        """What affects numbers beyond the spec; runs with the same record are the same to the byte."""
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,  # draws what drops out
            "instructions": _instructions(self.device),
            "threads": str(threads),
            "dtype": str(self.dtype).removeprefix("torch."),
            "packing": f"batches of a step together up to {PASS_TOKENS} tokens",
        }


def sealed(job: training_job_pb2.TrainingJob) -> training_job_pb2.TrainingSpec:
    """Returns a job's spec with what its first attempt decided: AUTO stays what it was, on whatever machine."""
    spec = training_job_pb2.TrainingSpec()
    spec.CopyFrom(job.spec)
    if job.HasField("resolved"):
        spec.dtype = job.resolved.dtype
    return spec


def _group(name: str) -> str:
    if name.startswith(DECODER):
        return "decoder"
    return "vision" if name.startswith(_VISION_LAYERS) else "merger"


def _shortest(config: ModelConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """The last parts of module names where they select the same linears, as people write them; else the names."""
    last = tuple(sorted({name.rpartition(".")[2] for name in names}))
    try:
        return last if set(target_linears(config, last)) == set(names) else names
    except TargetError:  # a last part is also that of a module which no adapter can have
        return names


def _instructions(device: str) -> str:
    """What a device computes with."""
    if device == "cpu":
        library = " by the compiled library" * native.AVAILABLE
        multiplied = [name for name in ("bfloat16", "float32") if native.MULTIPLIES[getattr(torch, name)]]
        products = "".join(f", products of {name} too" for name in multiplied)
        return torch.backends.cpu.get_cpu_capability() + library + products
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _dtype(dtype: model_pb2.Dtype.ValueType, device: str) -> torch.dtype:
    match dtype:
        case model_pb2.DTYPE_FLOAT32:
            return torch.float32
        case model_pb2.DTYPE_BFLOAT16:
            return torch.bfloat16
        case _:
            return torch.bfloat16 if device == "cuda" or bfloat16.SUPPORTED else torch.float32
