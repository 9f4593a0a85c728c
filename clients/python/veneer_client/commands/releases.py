"""`veneer adapters canary`, `diff`, `import`, `reproduce` and `delete`."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.trainer.v1.adapter_pb2 import AdapterVersion
from veneer.trainer.v1.training_job_pb2 import TrainingJob
from veneer_client import AdapterDiff, AsyncClient, Client, succeeded
from veneer_client._adapter_diff import Change
from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.adapters import Condition, Name, Reason, print_aliases
from veneer_client.commands.options import Directory, Json, connect
from veneer_client.commands.watching import watch_job


def canary(
    name: Name,
    version: Annotated[int | None, typer.Argument(min=1, help="The version's number. Leave out with --end.")] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="Its share of the requests, 0 to 1.")] = 0.1,
    alias: Annotated[str, typer.Option(help="The alias that it takes.")] = "canary",
    min_answers: Annotated[int, typer.Option(min=1, help="From how many on a bound is judged.")] = 50,
    max_error_rate: Annotated[float | None, typer.Option(help="Rolls back over this share of failed requests.")] = None,
    max_latency_ratio: Annotated[float | None, typer.Option(help="Rolls back when it is so much slower.")] = None,
    min_judgement: Annotated[float | None, typer.Option(help="Rolls back when people judge it lower, 0 to 1.")] = None,
    condition: Condition = "",
    reason: Reason = "",
    end: Annotated[bool, typer.Option("--end", help="Take the share back; the alias stays.")] = False,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Lets a version answer a share of the requests, and takes it back by itself when a bound is passed.

    A request's `routing_key` always falls on the same side. `veneer adapters log` says who moved what.

    Example:
        veneer adapters canary digits 4 --share 0.1 --max-error-rate 0.02 --max-latency-ratio 1.5
    """
    if (version is None) != end:
        raise typer.BadParameter("give the version's number, or --end")
    with connect(directory) as client:
        if version is None:
            adapter = client.adapters.end_canary(name)
        else:
            adapter = client.adapters.canary(
                name,
                version,
                share,
                alias=alias,
                min_answers=min_answers,
                max_error_rate=max_error_rate,
                max_latency_ratio=max_latency_ratio,
                min_judgement=min_judgement,
                condition=condition,
                reason=reason,
            )
    print_aliases(adapter, json)
    if not json and version is not None:
        print(f"{alias} takes {100 * share:.4g} % of the requests")


def diff(
    name: Name,
    before: Annotated[str, typer.Argument(help="The earlier version's number, or an alias.")],
    after: Annotated[str, typer.Argument(help="The later one.")],
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Shows what changed between two versions: data, parameters, figures.

    Example:
        veneer adapters diff digits 3 4
    """

    async def compare() -> AdapterDiff:
        async with AsyncClient(directory=directory) as client:
            return await client.adapter_diff(f"{name}@{before}", f"{name}@{after}")

    found = asyncio.run(compare())
    if json:
        screen.print_json(_diff_json(found))
        return
    print(f"{_named(found.before)} -> {_named(found.after)}")
    if found.before.digest == found.after.digest:
        print("the same adapter, to the byte")
    print(f"data: {_data(found)}")
    screen.print_table(("PARAMETER", "BEFORE", "AFTER"), map(_row, found.parameters), "parameters: the same")
    screen.print_table(("FIGURE", ">BEFORE", ">AFTER"), map(_row, found.metrics), "figures: the same, or none of both")


def import_folder(
    folder: Annotated[Path, typer.Argument(help="With adapter_config.json and adapter_model.safetensors.")],
    name: Annotated[str, typer.Option(help="The adapter that gets the version; created when it does not exist.")],
    model: Annotated[str | None, typer.Option(help="The base it was trained on. Default: the only one.")] = None,
    max_pixels: Annotated[int, typer.Option(min=0, help="Bound on a picture's area that it was trained with.")] = 0,
    description: Annotated[str, typer.Option(help="Where it comes from.")] = "",
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Publishes a PEFT folder that was made elsewhere, after a check of every tensor against the base.

    Example:
        veneer adapters import ./lora_adapter --name forms --description "trained on the workstation"
    """
    with connect(directory) as client:
        version = client.adapters.import_folder(
            folder, name, model=model, max_pixels=max_pixels, description=description
        )
    if json:
        screen.print_json(screen.as_json(version))
    else:
        print(f"imported {_named(version)}, {screen.size(version.size_bytes)}, rank {version.lora.rank}")


def reproduce(
    name: Name,
    version: Annotated[str, typer.Argument(help="The version's number, or an alias.")],
    into: Annotated[str, typer.Option(help="The adapter that gets the new version. Default: the same.")] = "",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Queue it and return at once.")] = False,
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Queues the job of a version again, and says whether the same adapter comes out; exits with 1 where not.

    Example:
        veneer adapters reproduce digits 3 --into digits-again
    """
    with connect(directory) as client:
        first = client.adapters.get_version(f"{name}@{version}")
        job = client.reproduce(first.name, into=into)
        if no_wait:
            screen.print_json(screen.as_json(job)) if json else print(f"{job.name} queued")
            return
        again = _made(client, job, json)
    same = again.digest == first.digest
    if json:
        facts = {"version": first.name, "digest": first.digest, "again": again.name, "again_digest": again.digest}
        screen.print_json(facts | {"same": same})
    elif same:
        print(f"the same: {_named(again)} has the digest of {short(first.name)}")
    else:
        print(f"another: {_named(again)} is not {_named(first)}")
        rows = [(name, old, new) for name, old, new in _circumstances(first, again) if old != new]
        screen.print_table(("CIRCUMSTANCE", "THEN", "NOW"), rows, "no recorded circumstance differs")
    if not same:
        raise typer.Exit(1)


def delete(
    name: Annotated[str, typer.Argument(help="A version, digits@3, or the whole adapter, digits.")],
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Deletes a version, or an adapter with all of them; refuses while an alias or unfinished work names it.

    Example:
        veneer adapters delete digits@3
    """
    with connect(directory) as client:
        client.adapters.delete_version(name) if "@" in name else client.adapters.delete(name)
    screen.print_json({"deleted": name}) if json else print(f"{name} is deleted; answers that use it finish")


def _made(client: Client, job: TrainingJob, json: bool) -> AdapterVersion:
    if json:
        return client.adapters.get_version(client.jobs.wait(job.name).adapter_version)
    return client.adapters.get_version(succeeded(watch_job(client, job.name, json)).adapter_version)


def _circumstances(first: AdapterVersion, again: AdapterVersion) -> list[tuple[str, str, str]]:
    """What a job resolved for itself and takes part in its numbers."""
    pairs = [("code version", first.lineage.code_version, again.lineage.code_version)]
    old, new = (screen.as_json(each.lineage.resolved) for each in (first, again))
    return pairs + [(name, str(old.get(name, "")), str(new.get(name, ""))) for name in sorted({*old, *new})]


def _named(version: AdapterVersion) -> str:
    return f"{short(version.name)} ({version.digest[:12]})"


def _data(found: AdapterDiff) -> str:
    old, new = (each.lineage.spec.dataset_version for each in (found.before, found.after))
    if not old or not new:
        return f"{short(old) or 'unknown'} -> {short(new) or 'unknown'}"
    if old == new:
        return f"the same, {short(old)}"
    if found.data is None:
        return f"{short(old)} -> {short(new)}, of which one is not there any more"
    data = found.data
    return (
        f"{short(old)} -> {short(new)}: {len(data.added)} rows added, {len(data.gone)} gone, "
        f"{len(data.changed)} changed, {len(data.moved)} moved, {data.same_rows} the same"
    )


def _row(change: Change) -> tuple[str, str, str]:
    return change.name, _text(change.before), _text(change.after)


def _text(value: Any) -> str:  # noqa: ANN401  # a JSON value
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _diff_json(found: AdapterDiff) -> dict[str, Any]:
    def changes(each: tuple[Change, ...]) -> list[dict[str, Any]]:
        return [{"name": one.name, "before": one.before, "after": one.after} for one in each]

    rows = None
    if found.data is not None:
        counts = {kind: len(getattr(found.data, kind)) for kind in ("added", "gone", "changed", "moved")}
        rows = counts | {"same": found.data.same_rows}
    sets = [each.lineage.spec.dataset_version for each in (found.before, found.after)]
    return {
        "before": screen.as_json(found.before),
        "after": screen.as_json(found.after),
        "same_digest": found.before.digest == found.after.digest,
        "data": {"before": sets[0], "after": sets[1], "rows": rows},
        "parameters": changes(found.parameters),
        "metrics": changes(found.metrics),
    }
