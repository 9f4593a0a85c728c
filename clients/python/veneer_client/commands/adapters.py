"""`veneer adapters …`."""

from pathlib import Path
from typing import Annotated

import typer

from veneer.trainer.v1.adapter_pb2 import Adapter, AliasMove
from veneer_client._names import short
from veneer_client.commands import screen
from veneer_client.commands.options import Directory, Json, connect

Name = Annotated[str, typer.Argument(help="The adapter.")]
Alias = Annotated[str, typer.Option(help="The alias to move.")]
Reason = Annotated[str, typer.Option(help="Why, for the log.")]
Condition = Annotated[
    str,
    typer.Option(
        "--if",
        "--condition",
        help='A gate over its evaluations: "exact_match >= 0.9 and exact_match >= production".',
    ),
]


def list_adapters(json: Json = False, directory: Directory = None) -> None:
    """Lists adapters, by name.

    Example:
        veneer adapters list
    """
    with connect(directory) as client:
        adapters = list(client.adapters.list())
    if json:
        screen.print_messages(adapters)
        return
    rows = [
        (
            short(each.name),
            short(each.model),
            str(each.latest_version),
            _aliases(each),
            screen.time(each.update_time),
        )
        for each in adapters
    ]
    columns = ("ADAPTER", "MODEL", ">NEWEST", "ALIASES", "CHANGED")
    screen.print_table(columns, rows, "no adapters yet: veneer train DATASET --adapter NAME")


def show(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Shows an adapter and its versions, newest first.

    Example:
        veneer adapters show digits
    """
    with connect(directory) as client:
        adapter = client.adapters.get(name)
        versions = list(client.adapters.versions(name))
    if json:
        listed = [screen.as_json(version) for version in versions]
        screen.print_json({"adapter": screen.as_json(adapter), "versions": listed})
        return
    split = adapter.traffic_split
    share = (
        f"{split.alias} takes {100 * split.share:.4g} % of the requests" if adapter.HasField("traffic_split") else ""
    )
    facts = [("adapter", adapter.name), ("model", short(adapter.model)), ("aliases", _aliases(adapter))]
    screen.print_facts([*facts, ("traffic", share)])
    rows = [
        (
            version.name.rpartition("/")[2],
            version.digest[:12],
            str(version.lora.rank),
            screen.size(version.size_bytes),
            ", ".join(version.aliases),
            short(version.lineage.training_job) or "imported",
            screen.time(version.create_time),
        )
        for version in versions
    ]
    columns = (">VERSION", "DIGEST", ">RANK", ">SIZE", "ALIASES", "FROM", "PUBLISHED")
    screen.print_table(columns, rows, "no version is published yet")


def promote(
    name: Name,
    version: Annotated[int, typer.Argument(min=1, help="The version's number.")],
    alias: Alias = "production",
    condition: Condition = "",
    reason: Reason = "",
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Points an alias at a version. Requests that name the adapter alone are answered by `production`.

    Example:
        veneer adapters promote digits 2 --if "exact_match >= 0.9 and exact_match >= production"
    """
    with connect(directory) as client:
        adapter = client.adapters.promote(name, version, alias=alias, condition=condition, reason=reason)
    print_aliases(adapter, json)


def rollback(
    name: Name,
    alias: Alias = "production",
    reason: Reason = "",
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Points an alias back at the version before.

    Example:
        veneer adapters rollback digits
    """
    with connect(directory) as client:
        adapter = client.adapters.rollback(name, alias=alias, reason=reason)
    print_aliases(adapter, json)


def log(name: Name, json: Json = False, directory: Directory = None) -> None:
    """Shows who moved which alias, newest first.

    Example:
        veneer adapters log digits
    """
    with connect(directory) as client:
        moves = list(client.adapters.log(name))
    if json:
        screen.print_messages(moves)
        return
    rows = [
        (
            screen.time(move.move_time),
            move.alias,
            _move(move),
            move.actor,
            move.reason,
        )
        for move in moves
    ]
    screen.print_table(("WHEN", "ALIAS", "MOVE", "BY", "WHY"), rows, "no alias was moved yet")


def download(
    name: Annotated[str, typer.Argument(help="digits for production, digits@3, or digits@canary.")],
    folder: Annotated[Path, typer.Argument(help="Gets the PEFT files; created when it does not exist.")],
    json: Json = False,
    directory: Directory = None,
) -> None:
    """Downloads a version as a folder that `PeftModel.from_pretrained` loads.

    Example:
        veneer adapters download digits@2 ./digits-adapter
    """
    with connect(directory) as client:
        client.adapters.download(name, folder)
    files = sorted(path.name for path in folder.iterdir())
    if json:
        screen.print_json({"folder": str(folder), "files": files})
    else:
        print(f"{folder}: {', '.join(files)}")


def _move(move: AliasMove) -> str:
    if move.from_version == move.to_version:
        return str(move.to_version)
    return f"{move.from_version or 'nothing'} -> {move.to_version or 'nothing'}"


def _aliases(adapter: Adapter) -> str:
    return ", ".join(f"{alias} = {number}" for alias, number in sorted(adapter.aliases.items()))


def print_aliases(adapter: Adapter, json: bool) -> None:
    """Prints where an adapter's aliases point now."""
    if json:
        screen.print_json(screen.as_json(adapter))
    else:
        print(f"{adapter.name}: {_aliases(adapter)}")
