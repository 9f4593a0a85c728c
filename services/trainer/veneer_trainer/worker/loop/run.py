"""A training job from its rows to its adapter. It reads from top to bottom."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import structlog
import torch

from veneer.trainer.v1 import model_pb2, training_job_pb2
from veneer_digests import adapter_digest, tensor_digests
from veneer_processing import ProcessingContract, Processor
from veneer_trainer.failpoints import failpoint
from veneer_trainer.worker.loop.batches import Ahead, Batches
from veneer_trainer.worker.loop.common import Common
from veneer_trainer.worker.loop.dataset import Dataset
from veneer_trainer.worker.loop.gauges import Gauges
from veneer_trainer.worker.loop.learner import Learner, Turn
from veneer_trainer.worker.loop.link import JobLink
from veneer_trainer.worker.loop.plan import Plan, sealed
from veneer_trainer.worker.loop.rows import Split
from veneer_trainer.worker.loop.state import State
from veneer_trainer.worker.messages import CheckpointMade, Progressed, Resolved, Stopped, Trained
from veneer_trainer.worker.refusal import Refused
from veneer_vlm import peft_folder
from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter

CONTRACT_FILE = "processing_contract.json"
_CHECKPOINT_S = 60.0
_TOLD_S = 0.2  # figures between two steps that are quicker are not told
_log = structlog.get_logger(__name__)


def train(link: JobLink, common: Common) -> Generator[Turn, Exception | None]:
    """Trains, and tells the worker what it makes.

    Yields:
        What it brings to each step; it is sent why its adapter was not moved, None where it was.

    Raises:
        Refused: the job cannot go on.
        VeneerError, RefusedError, ProcessingError: spec, base or data do not fit one another.
    """
    task = link.task
    job = training_job_pb2.TrainingJob.FromString(task.job)
    spec, folder, ranks = sealed(job), Path(task.folder), common.ranks

    config = ModelConfig.from_directory(Path(task.model_directory))
    plan = Plan.of(spec, config, device=task.device)
    processor = processor_under(Path(task.model_directory), task.model_digest, spec.max_pixels)
    dataset = Dataset(
        task.dataset,
        Path(task.certificates_file) if task.certificates_file else None,
        lambda: link.delegation,
        spec.dataset_version,
        spec.model,
        spec.max_pixels,
        task.dataset_patience_s,
    )
    facts = dataset.facts()
    split = common.split(dataset, processor, facts, spec, spec.train_split)
    if not split.used_rows:
        raise Refused("NO_ROWS", f"split {spec.train_split} has no row of at most {spec.max_length} tokens")
    validation = None
    if spec.validation_split:
        validation = common.split(dataset, processor, facts, spec, spec.validation_split)
    failpoint("rows.loaded")
    total_steps, per_epoch = plan.total_steps(split.used_rows), plan.steps_per_epoch(split.used_rows)

    model, features = common.model(plan.dtype), common.features(plan, processor.contract)
    state = State.fresh(config, plan)
    figures = state.figures
    if task.checkpoint_folder:
        state.restore(Path(task.checkpoint_folder))
        figures = state.figures
    elif task.initial_folder:
        state.start_from(Path(task.initial_folder), config)
    batches = Batches(processor, plan, features.known if features else lambda sha256: None, ranks)
    learner, gauges = Learner(model, state, plan, features, ranks), Gauges(plan.device)
    interval = spec.checkpoint_interval_steps or job.resolved.checkpoint_interval_steps
    every = spec.validation_interval_steps or (per_epoch if spec.HasField("early_stopping") else 0)
    is_resolved = job.HasField("resolved")
    stored_step, stored_s, told_s = figures.step, time.monotonic(), 0.0
    rate, over = plan.learning_rate(max(figures.step - 1, 0), total_steps), False
    _log.info("training", job=job.name, rows=split.used_rows, step=figures.step, total_steps=total_steps)

    def tell() -> None:
        progress = gauges.progress(figures, total_steps, figures.step / per_epoch, rate)
        link.send(Progressed(progress.SerializeToString()))

    def checkpoint() -> None:
        if not ranks.leads:
            return
        made = folder / f"checkpoint-{figures.step}"
        state.save(made)
        failpoint("checkpoint.made")
        link.send(CheckpointMade(figures.step, str(made)))

    def validate() -> bool:
        """Measures validation loss; says whether training is to end early."""
        if validation is None or not validation.used_rows or figures.validated_step == figures.step:
            return False
        figures.validation_loss = learner.loss(batches.validation(validation))
        figures.validated_step = figures.step
        failpoint("validation.done")
        best, stopping = figures.best_validation_loss, spec.early_stopping
        if best is None or figures.validation_loss < best - stopping.min_delta:
            figures.best_validation_loss, figures.waited = figures.validation_loss, 0
            if spec.HasField("early_stopping"):
                state.keep_best()
        else:
            figures.waited += 1
        return spec.HasField("early_stopping") and figures.waited >= stopping.patience

    with closing(Ahead(batches.training(split, figures.step, total_steps))) as ahead:
        for step in ahead:
            began_s = time.monotonic()
            rate = plan.learning_rate(figures.step, total_steps)
            problem = yield Turn(learner, step, rate)
            if problem is not None:
                raise problem
            now_s = time.monotonic()
            figures.elapsed_s += now_s - began_s
            gauges.count(now_s - began_s, step)
            if not interval:  # as many steps as take about a minute, sealed from now on
                interval = min(max(1, round(_CHECKPOINT_S / (now_s - began_s))), total_steps)
            if not is_resolved:
                is_resolved = True
                resolved = _resolved(
                    plan, processor.contract, split, total_steps, interval, state.adapter, task.threads
                )
                resolved.numerics["ranks"] = str(ranks.size)
                resolved.activation_checkpointing = model.language_model.recompute
                link.send(Resolved(resolved.SerializeToString()))
            if every and figures.step % every == 0:
                over = validate()
            over, stopping = ranks.agreed(over, link.stopping.is_set())
            if now_s - told_s >= _TOLD_S or figures.step == total_steps or over:
                told_s = now_s
                tell()
            if over or figures.step == total_steps:
                break
            due = figures.step % interval == 0 or now_s - stored_s > 2 * _CHECKPOINT_S
            if stopping or due:
                if figures.step > stored_step:
                    checkpoint()
                stored_step, stored_s = figures.step, time.monotonic()
            if stopping:
                tell()
                link.send(Stopped())
                return
    validate()
    if spec.HasField("early_stopping"):
        state.take_best()
    if not ranks.leads:
        return
    final = gauges.progress(figures, total_steps, figures.step / per_epoch, rate)
    digest = write_adapter(state.adapter, processor.contract, folder / "adapter")
    failpoint("adapter.written")
    link.send(Progressed(final.SerializeToString()))
    link.send(Trained(str(folder / "adapter"), digest, final.SerializeToString()))


def processor_under(directory: Path, model_digest: str, max_pixels: int) -> Processor:
    """Returns the base's processor under a job's pixel bound; raises ProcessingError."""
    default = Processor.load(directory, model_digest)
    least = min(default.contract.min_pixels, max_pixels)
    return default.under(dataclasses.replace(default.contract, min_pixels=least, max_pixels=max_pixels))


def write_adapter(adapter: Adapter, contract: ProcessingContract, folder: Path) -> str:
    """Writes a PEFT folder with its contract beside it; returns the adapter's digest."""
    peft_folder.write(adapter, folder)
    text = json.dumps(contract.to_dict(), indent=2, sort_keys=True)
    (folder / CONTRACT_FILE).write_text(text + "\n", "utf-8")
    config = json.loads((folder / peft_folder.CONFIG_FILE).read_text("utf-8"))
    return adapter_digest(tensor_digests(folder / peft_folder.TENSOR_FILE), config, contract.digest)


def _resolved(
    plan: Plan,
    contract: ProcessingContract,
    split: Split,
    total_steps: int,
    interval: int,
    adapter: Adapter,
    threads: int,
) -> training_job_pb2.ResolvedTraining:
    sealed = model_pb2.ProcessingContract(digest=contract.digest, **dataclasses.asdict(contract))
    return training_job_pb2.ResolvedTraining(
        model_digest=contract.model_digest,
        contract=sealed,
        dtype=model_pb2.DTYPE_BFLOAT16 if plan.dtype is torch.bfloat16 else model_pb2.DTYPE_FLOAT32,
        device=plan.device,
        target_modules=plan.target_modules,
        trainable_parameters=sum(tensor.numel() for _, tensor in adapter.tensors()),
        train_rows=split.used_rows,
        skipped_rows=split.skipped_rows,
        total_steps=total_steps,
        checkpoint_interval_steps=interval,
        numerics=plan.numerics(threads),
    )
