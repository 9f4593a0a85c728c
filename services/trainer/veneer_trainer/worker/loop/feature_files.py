"""Features of pictures on disk, kept from job to job; bounded, and never trusted further than their digest."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from veneer_vlm.vision import VisionTower, VisualFeatures

_SUFFIX, _PARTIAL = ".features", ".partial"
_DIGEST_BYTES = hashlib.sha256().digest_size
_log = structlog.get_logger(__name__)


def depends_on(tower: VisionTower, tenant: str, contract: str, numerics: Mapping[str, str]) -> dict[str, str]:
    """What features depend on beside their picture, and whose they are.

    Args:
        tower: with its mergers.
        tenant: features are found by their own tenant alone.
        contract: digest of the processing contract.
        numerics: dtype, versions, instructions, threads: under another record the bits are others.
    """
    return {**numerics, "tenant": tenant, "contract": contract, "tower": tower_digest(tower)}


def tower_digest(tower: VisionTower) -> str:
    """The SHA-256 of the weights of tower and mergers, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def key_of(about: Mapping[str, str], picture: str) -> str:
    """The name of a picture's features: a digest of all that they depend on, and of whose they are."""
    return hashlib.sha256(json.dumps([*sorted(about.items()), picture]).encode()).hexdigest()


class FeatureFiles:
    """A folder of features; one process uses it at a time.

    What this run has read or written stays while it lasts; of the rest the longest unused goes when room is needed.

    Args:
        folder: made when missing.
        max_bytes: most that the files take together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for partial in folder.glob(f"*{_PARTIAL}"):
            partial.unlink()
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        found = [(path, path.stat()) for path in folder.glob(f"*{_SUFFIX}")]
        found.sort(key=lambda each: each[1].st_mtime_ns)
        self._unused = {path.stem: stat.st_size for path, stat in found}  # the longest unused first
        self._used: dict[str, int] = {}

    def get(self, key: str) -> VisualFeatures | None:
        """Returns features; None where there are none, or where the file is damaged: it is removed then."""
        path = self._path(key)
        with self._lock:
            if key not in self._used and key not in self._unused:
                return None
            try:
                data = path.read_bytes()
                features = _read(data)
                os.utime(path)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                _log.warning("features dropped", key=key, problem=str(error))
                path.unlink(missing_ok=True)
                self._used.pop(key, None)
                self._unused.pop(key, None)
                return None
            self._unused.pop(key, None)
            self._used[key] = len(data)
            return features

    def put(self, key: str, features: VisualFeatures) -> None:
        """Keeps features, where room can be made for them and the disk takes them."""
        tensors = {str(level): each for level, each in enumerate((features.tokens_M_D, *features.deepstack_M_D))}
        body = save(tensors)
        data = hashlib.sha256(body).digest() + body
        with self._lock:
            if key in self._used or not self._make_room(len(data)):
                return
            partial = self._folder / f"{key}{_PARTIAL}"
            try:
                partial.write_bytes(data)
                partial.replace(self._path(key))
            except OSError as error:  # without them a picture goes through the tower again, no more
                _log.warning("features not kept", key=key, problem=str(error))
                partial.unlink(missing_ok=True)
                self._max_bytes = 0
                return
            self._used[key] = len(data)

    def _make_room(self, size_bytes: int) -> bool:
        used_bytes = sum(self._used.values())
        if used_bytes + size_bytes > self._max_bytes:
            return False
        while used_bytes + sum(self._unused.values()) + size_bytes > self._max_bytes:
            oldest = next(iter(self._unused))
            self._path(oldest).unlink(missing_ok=True)
            del self._unused[oldest]
        return True

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def _read(data: bytes) -> VisualFeatures:
    body = data[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != data[:_DIGEST_BYTES]:
        raise ValueError("the bytes are not those that were written")
    tensors = load(body)
    tokens_M_D, *deepstack_M_D = (tensors[str(level)] for level in range(len(tensors)))
    return VisualFeatures(tokens_M_D, tuple(deepstack_M_D))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data
