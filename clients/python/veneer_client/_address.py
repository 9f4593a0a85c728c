"""Where a cluster is: from arguments, from the environment, or from the file that a local cluster writes."""

import ipaddress
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer_client._errors import ClusterNotFound

CLUSTER_FILE = "cluster.json"


@dataclass(frozen=True)
class Cluster:
    """How to reach a cluster.

    Attributes:
        dataset: host:port or unix:/path of the dataset service.
        trainer: the same of the trainer service.
        inference: the same of each replica of the inference service.
        token: who calls.
        ca_file: PEM certificates to trust instead of the system's.
    """

    dataset: str = ""
    trainer: str = ""
    inference: tuple[str, ...] = ()
    token: str = ""
    ca_file: Path | None = None


def default_directory() -> Path:
    """The folder of the cluster on this machine: `VENEER_DIR`, else a folder of the XDG data directory."""
    if "VENEER_DIR" in os.environ:
        return Path(os.environ["VENEER_DIR"])
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "veneer"


def find(given: Cluster | None = None, directory: Path | None = None) -> Cluster:
    """Returns the cluster to call.

    What is given wins over the environment (VENEER_DATASET, VENEER_TRAINER, VENEER_INFERENCE with commas,
    VENEER_TOKEN, VENEER_CA_FILE), and that over the file in `directory`, else in the default one. When a
    directory is given, its file wins over the environment. An inference service may stand alone, as `veneer serve`
    starts it.

    Raises:
        ClusterNotFound: an address or the token is missing, or the file cannot be read.
    """
    sources = [_environment(), _file(directory or default_directory())]
    if directory is not None:
        sources.reverse()
    cluster = given or Cluster()
    for source in sources:
        cluster = _filled(cluster, source)
    missing = [name for name in ("dataset", "trainer", "inference", "token") if not getattr(cluster, name)]
    if missing and missing != ["dataset", "trainer"]:
        raise ClusterNotFound(
            f"no cluster runs in {directory or default_directory()}, and nothing else gives its "
            f"{', '.join(missing)}. Set " + ", ".join(f"VENEER_{name.upper()}" for name in missing)
        )
    return cluster


def write(cluster: Cluster, directory: Path) -> None:
    """Writes the file that `find` reads; only its owner may read it, for it holds the token."""
    document = {
        "dataset": cluster.dataset,
        "trainer": cluster.trainer,
        "inference": list(cluster.inference),
        "token": cluster.token,
    }
    new = directory / f".{CLUSTER_FILE}.{os.getpid()}"
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
    new.replace(directory / CLUSTER_FILE)


def is_local(address: str) -> bool:
    """Whether no other machine can listen in on a connection to this address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _environment() -> Cluster:
    ca_file = os.environ.get("VENEER_CA_FILE")
    return Cluster(
        os.environ.get("VENEER_DATASET", ""),
        os.environ.get("VENEER_TRAINER", ""),
        tuple(filter(None, map(str.strip, os.environ.get("VENEER_INFERENCE", "").split(",")))),
        os.environ.get("VENEER_TOKEN", ""),
        Path(ca_file) if ca_file else None,
    )


def _file(directory: Path) -> Cluster:
    path = directory / CLUSTER_FILE
    try:
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        addresses = tuple(map(str, document["inference"]))
        return Cluster(str(document["dataset"]), str(document["trainer"]), addresses, str(document["token"]))
    except FileNotFoundError:
        return Cluster()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterNotFound(f"{path} cannot be read: {error!r}") from error


def _filled(cluster: Cluster, source: Cluster) -> Cluster:
    empty = [name for name in cluster.__dataclass_fields__ if not getattr(cluster, name)]
    return replace(cluster, **{name: getattr(source, name) for name in empty})
