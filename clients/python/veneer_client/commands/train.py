"""`veneer train` and `veneer jobs …`."""

import itertools
from enum import Enum
from typing import Annotated

import typer

from veneer.trainer.v1 import training_job_pb2
from veneer.trainer.v1.training_job_pb2 import EarlyStopping, JobState, OverLength, TrainingJob, TrainingSpec
from veneer_client import state_name, succeeded
from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.options import Directory, Json, connect
from veneer_client.commands.watching import job_line, watch_job

Name = Annotated[str, typer.Argument(help="The job, as `veneer jobs list` names it.")]


class Priority(Enum):
    """Which of a tenant's jobs come first."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


def train(
    dataset: Annotated[str, typer.Argument(help="digits for the newest version, digits@<digest> for another.")],
    adapter: Annotated[str, typer.Option(help="Gets the new version; created when it does not exist.")],
    model: Annotated[str | None, typer.Option(help="The base. Default: the only one there is.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data. Default: 3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the low-rank update. Default: 8.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The update is scaled by alpha / rank. Default: 16.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A linear to adapt, or attention, decoder, decoder+merger, decoder+merger+vision."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The greatest one. Default: 2e-4.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows computed together. Default: 1.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row at most. Default: 512.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Pixels of a picture at most. Default: 200704.")] = None,
    skip_long: Annotated[bool, typer.Option("--skip-long", help="Leave longer rows out, else they refuse.")] = False,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations. Default: at the end.")] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many validations without a better loss, publish the best checkpoint."),
    ] = None,
    priority: Annotated[Priority, typer.Option(help="Before or after your other jobs.")] = Priority.NORMAL,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same adapter. Default: 0.")] = None,
    start_from: Annotated[
        str, typer.Option("--from", help="A version to continue, such as digits@2, with its rank, alpha and targets.")
    ] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show how it goes.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and estimate, queue nothing.")] = False,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Queues a training job. Once this returns, the job is not lost.

    Example:
        veneer train digits --adapter digits --epochs 5 --rank 16 --watch
    """
    if epochs is not None and steps is not None:
        raise typer.BadParameter("give --epochs or --steps, not both")
    spec = TrainingSpec(
        over_length=OverLength.OVER_LENGTH_SKIP if skip_long else OverLength.OVER_LENGTH_UNSPECIFIED,
        priority=training_job_pb2.Priority.Value(f"PRIORITY_{priority.name}"),
        validation_interval_steps=validate_every,
        early_stopping=None if patience is None else EarlyStopping(patience=patience),
    )
    with connect(directory) as client:
        job = client.jobs.train(
            dataset,
            adapter,
            model=model,
            epochs=epochs,
            steps=steps,
            rank=rank,
            alpha=alpha,
            target_modules=target or (),
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_length=max_length,
            max_pixels=max_pixels,
            seed=seed,
            start_from=start_from,
            spec=spec,
            validate_only=dry_run,
        )
        if dry_run or not watch:
            _print_job(job, json, "would be accepted" if dry_run else "queued")
            return
        _report_end(watch_job(client, job.name, json), json)


def list_jobs(
    state: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    adapter: Annotated[str, typer.Option(help="Only jobs for this adapter.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Lists training jobs, newest first.

    Example:
        veneer jobs list --state running --state queued
    """
    states = [_state(name) for name in state or ()]
    with connect(directory) as client:
        jobs = list(itertools.islice(client.jobs.list(states=states, adapter=adapter), limit))
    if json:
        screen.print_messages(jobs)
        return
    rows = [
        (
            job.name.removeprefix("trainingJobs/"),
            screen.state(job.state),
            short(job.spec.adapter),
            short(job.spec.dataset_version),
            f"{job.progress.step}/{job.progress.total_steps}" if job.progress.step else "",
            f"{job.progress.loss:.4f}" if job.progress.step else "",
            screen.time(job.create_time),
        )
        for job in jobs
    ]
    columns = ("JOB", "STATE", "ADAPTER", "DATASET", ">STEP", ">LOSS", "CREATED")
    screen.print_table(columns, rows, "no jobs: veneer train DATASET --adapter NAME")


def show(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Shows a job: what was ordered, how far it is, and what became of each attempt.

    Example:
        veneer jobs show 7f3a
    """
    with connect(directory) as client:
        job = client.jobs.get(name)
    if json:
        screen.print_json(screen.as_json(job))
        return
    spec, resolved, progress = job.spec, job.resolved, job.progress
    length = f"{spec.steps} steps" if spec.HasField("steps") else f"{spec.epochs} epochs"
    screen.print_facts(
        [
            ("job", job.name),
            ("state", screen.state(job.state)),
            ("why", f"{job.failure.message} ({job.failure.reason})" if job.HasField("failure") else ""),
            ("tried again", screen.time(job.retry_time)),
            ("adapter", short(job.adapter_version or spec.adapter)),
            ("started from", short(spec.initial_adapter_version) if spec.initial_adapter_version else ""),
            ("model", short(spec.model)),
            ("dataset", short(spec.dataset_version)),
            ("length", length),
            ("rank", f"{spec.lora.rank}, alpha {spec.lora.alpha:g}"),
            (
                "trainable",
                f"{resolved.trainable_parameters:,} parameters" if resolved.trainable_parameters else "",
            ),
            ("progress", job_line(job).partition("  ")[2] if progress.step else ""),
            ("checkpoint", f"step {progress.checkpoint_step}" if progress.checkpoint_step else ""),
            ("peak memory", screen.size(progress.peak_memory_bytes) if progress.peak_memory_bytes else ""),
            ("created", screen.time(job.create_time)),
            ("ended", screen.time(job.end_time)),
        ]
    )
    if len(job.attempts) > 1:
        rows = [
            (
                str(each.number),
                each.worker,
                screen.time(each.start_time),
                f"{each.resumed_step}-{each.last_step}",
                each.failure.reason,
            )
            for each in job.attempts
        ]
        screen.print_table((">ATTEMPT", "WORKER", "BEGAN", ">STEPS", "ENDED BY"), rows, "")


def watch(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Shows how a job goes until it has ended; exits with 1 when it did not succeed.

    Example:
        veneer jobs watch 7f3a
    """
    with connect(directory) as client:
        _report_end(watch_job(client, name, json), json)


def cancel(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Stops a job for good, within a step.

    Example:
        veneer jobs cancel 7f3a
    """
    with connect(directory) as client:
        _print_job(client.jobs.cancel(name), json)


def pause(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Stops a job after a checkpoint, until it is resumed.

    Example:
        veneer jobs pause 7f3a
    """
    with connect(directory) as client:
        _print_job(client.jobs.pause(name), json)


def resume(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Queues a paused job again.

    Example:
        veneer jobs resume 7f3a
    """
    with connect(directory) as client:
        _print_job(client.jobs.resume(name), json)


def retry(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Queues a failed or dead-lettered job again, from its last good checkpoint.

    Example:
        veneer jobs retry 7f3a
    """
    with connect(directory) as client:
        _print_job(client.jobs.retry(name), json)


def _report_end(job: TrainingJob, json: bool) -> None:
    succeeded(job)
    if not json:
        print(f"published {short(job.adapter_version)}: veneer chat --adapter {short(job.spec.adapter)} ...")


def _print_job(job: TrainingJob, json: bool, word: str = "") -> None:
    if json:
        screen.print_json(screen.as_json(job))
        return
    name = job.name.removeprefix("trainingJobs/")
    print(f"{job.name} {word or state_name(job.state)}")
    if word == "queued":
        print(f"veneer jobs watch {name}")
    elif word:
        estimate = job.estimate
        print(f"{estimate.steps:,} steps, {estimate.trainable_parameters:,} trainable parameters")
        if estimate.HasField("duration"):
            print(f"about {screen.duration(screen.seconds(estimate.duration))} on {estimate.worker_class}")


def _state(name: str) -> JobState.ValueType:
    wanted = f"JOB_STATE_{name.upper().replace(' ', '_').replace('-', '_')}"
    if wanted not in JobState.keys() or wanted == "JOB_STATE_UNSPECIFIED":  # noqa: SIM118  # an enum, no dict
        known = ", ".join(state_name(state).replace(" ", "-") for state in JobState.values() if state)
        raise typer.BadParameter(f"{name} is no state; there are {known}")
    return JobState.Value(wanted)
