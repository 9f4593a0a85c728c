"""The registry's copy on disk, from which a replica starts when the trainer is away."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import structlog

from veneer_inference.domain.registry import Registry, Release, Served, Split
from veneer_rpc.names import AdapterVersionName

_log = structlog.get_logger(__name__)
_FORMAT = 1


class RegistryFile:
    """One JSON file, replaced as a whole."""

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self._model = model

    def load(self) -> Registry:
        """Reads the copy; an empty one where there is none, or one of another base or of a form not known here."""
        try:
            document = json.loads(self._path.read_bytes())
            if document["format"] == _FORMAT and document["model"] == self._model:
                return Registry(
                    0,  # the first stream of a process asks for a snapshot
                    [_served(each) for each in document["adapters"]],
                    [_release(each) for each in document["versions"]],
                )
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("the registry's copy cannot be read; asking the trainer", problem=repr(error))
        return Registry()

    def document(self, registry: Registry) -> bytes:
        """The copy as it is to be written; made on the event loop, which owns the registry."""
        content = {
            "format": _FORMAT,
            "model": self._model,
            "revision": registry.revision,
            "adapters": [
                {
                    "tenant": each.tenant,
                    "adapter": each.adapter,
                    "aliases": {alias: _row(release) for alias, release in each.aliases.items()},
                    "split": {"alias": each.split.alias, "share": each.split.share} if each.split else None,
                    "preload": each.preload,
                }
                for each in registry.served
            ],
            "versions": [_row(release) for release in registry.known],
        }
        return json.dumps(content, ensure_ascii=False).encode()

    def write(self, document: bytes) -> None:
        """Replaces the file; a crash leaves the old one or the new one."""
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".registry-", delete=False) as new:
            new.write(document)
            new.flush()
            os.fsync(new.fileno())
        Path(new.name).replace(self._path)


def _row(release: Release) -> dict[str, object]:
    return {
        "tenant": release.tenant,
        "adapter": release.version.adapter,
        "version": release.version.version,
        "digest": release.digest,
    }


def _release(row: dict[str, Any]) -> Release:
    return Release(row["tenant"], AdapterVersionName(row["adapter"], row["version"]), row["digest"])


def _served(row: dict[str, Any]) -> Served:
    split = row["split"]
    return Served(
        row["tenant"],
        row["adapter"],
        {alias: _release(each) for alias, each in row["aliases"].items()},
        Split(split["alias"], split["share"]) if split else None,
        row["preload"],
    )
