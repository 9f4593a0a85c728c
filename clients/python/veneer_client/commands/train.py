"""`veneer train` and `veneer jobs …`."""

import itertools
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any

import typer

from veneer.trainer.v1 import training_job_pb2
from veneer.trainer.v1.training_job_pb2 import CoTrain, EarlyStopping, JobState, OverLength, TrainingJob, TrainingSpec
from veneer_client import Client, compared, state_name, succeeded
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
    co_train: Annotated[
        bool | None,
        typer.Option(
            "--co-train/--alone",
            help="Share passes over the base with your other jobs: sooner done together, equal to the run alone within "
            "a tolerance, not to the byte. Default: alone, but for a sweep.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Queue a job for each combination of values, such as rank=8,16 lr=1e-4,2e-4."),
    ] = None,
    more_axes: Annotated[list[str] | None, typer.Argument(metavar="[AXIS=VALUES]...", help="Of --sweep.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and show how it goes.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and estimate, queue nothing.")] = False,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Queues a training job. Once this returns, the job is not lost.

    Example:
        veneer train digits --adapter digits --epochs 5 --rank 16 --watch
        veneer train digits --adapter digits --sweep rank=8,16 lr=1e-4,2e-4 --watch
    """
    if more_axes and not sweep:
        raise typer.BadParameter(f"{more_axes[0]} stands for nothing without --sweep")
    axes = _axes([*(sweep or ()), *(more_axes or ())])
    if (epochs is not None or "epochs" in axes) and (steps is not None or "steps" in axes):
        raise typer.BadParameter("give --epochs or --steps, not both")
    spec = TrainingSpec(
        over_length=OverLength.OVER_LENGTH_SKIP if skip_long else OverLength.OVER_LENGTH_UNSPECIFIED,
        priority=training_job_pb2.Priority.Value(f"PRIORITY_{priority.name}"),
        validation_interval_steps=validate_every,
        co_train=_co_train(together=co_train),
        early_stopping=None if patience is None else EarlyStopping(patience=patience),
    )
    order: dict[str, Any] = {
        "model": model,
        "epochs": epochs,
        "steps": steps,
        "rank": rank,
        "alpha": alpha,
        "target_modules": target or (),
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "max_length": max_length,
        "max_pixels": max_pixels,
        "seed": seed,
        "start_from": start_from,
        "spec": spec,
        "validate_only": dry_run,
    }
    for name in axes:
        if order.get(name) is not None:
            raise typer.BadParameter(f"{name} is swept: leave its own option out")
    with connect(directory) as client:
        if axes:
            _sweep(client, dataset, adapter, axes, order, watch=watch, json=json)
            return
        job = client.jobs.train(dataset, adapter, **order)
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


def compare(
    names: Annotated[list[str], typer.Argument(metavar="JOB...", help="Jobs, as `veneer jobs list` names them.")],
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Shows jobs side by side: where their settings differ, and what each came to.

    Example:
        veneer jobs compare 7f3a 90bc
    """
    with connect(directory) as client:
        _print_comparison([client.jobs.get(name) for name in names], json)


def _sweep(
    client: Client,
    dataset: str,
    adapter: str,
    axes: Mapping[str, Sequence[float]],
    order: dict[str, Any],
    *,
    watch: bool,
    json: bool,
) -> None:
    try:
        jobs = client.jobs.sweep(dataset, adapter, axes, **order)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if order["validate_only"] or not watch:
        _print_comparison(jobs, json)
        if not json:
            verb = "would be accepted" if order["validate_only"] else "queued"
            ids = " ".join(job.name.removeprefix("trainingJobs/") for job in jobs)
            print(f"{len(jobs)} jobs {verb}" + ("" if order["validate_only"] else f"\nveneer jobs compare {ids}"))
        return
    ended = [watch_job(client, job.name, json) for job in jobs]
    _print_comparison(ended, json)
    for job in ended:
        succeeded(job)


def _co_train(*, together: bool | None) -> CoTrain.ValueType:
    if together is None:
        return CoTrain.CO_TRAIN_UNSPECIFIED
    return CoTrain.CO_TRAIN_ALLOWED if together else CoTrain.CO_TRAIN_FORBIDDEN


def _axes(texts: Sequence[str]) -> dict[str, list[float]]:
    """What `rank=8,16` and `lr=1e-4,2e-4` say."""
    axes: dict[str, list[float]] = {}
    for text in texts:
        for each in text.split():
            name, equals, values = each.partition("=")
            name = {"lr": "learning_rate"}.get(name, name.replace("-", "_"))
            try:
                numbers = [float(value) for value in values.split(",")]
            except ValueError:
                numbers = []
            if not equals or not numbers:
                raise typer.BadParameter(f"{each} is no axis: write it like rank=8,16")
            if name in axes:
                raise typer.BadParameter(f"{name} is swept twice")
            axes[name] = numbers
    return axes


def _print_comparison(jobs: Sequence[TrainingJob], json: bool) -> None:
    if json:
        screen.print_messages(jobs)
        return
    trials = compared(jobs)
    names = list(trials[0].settings)
    rows = [
        (
            trial.job.name.removeprefix("trainingJobs/"),
            *trial.settings.values(),
            screen.state(trial.job.state),
            f"{trial.job.progress.loss:.4f}" if trial.job.progress.step else "",
            f"{trial.job.progress.validation_loss:.4f}" if trial.job.progress.HasField("validation_loss") else "",
            _time_of(trial.job),
            short(trial.job.adapter_version) if trial.job.adapter_version else "",
            "best" if trial.is_best else "",
        )
        for trial in trials
    ]
    titles = [f">{name.upper()}" for name in names]
    screen.print_table(("JOB", *titles, "STATE", ">LOSS", ">VALIDATION", ">TIME", "VERSION", ""), rows, "no jobs")


def _time_of(job: TrainingJob) -> str:
    """What training took; of a job that has not begun, what it is expected to take."""
    if job.progress.step:
        return screen.duration(screen.seconds(job.progress.elapsed))
    if job.estimate.HasField("duration"):
        return f"about {screen.duration(screen.seconds(job.estimate.duration))}"
    return ""


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
