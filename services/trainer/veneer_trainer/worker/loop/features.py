"""Features of pictures: computed once each where the tower is frozen, in every pass where it is trained."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch

from veneer_trainer.worker.loop.batches import Seen
from veneer_trainer.worker.loop.feature_files import FeatureFiles, key_of
from veneer_vlm.linear import Adapters
from veneer_vlm.model import VisionLanguageModel
from veneer_vlm.vision import VisualFeatures


class FrozenFeatures:
    """Features under a frozen tower, kept in memory while there is room, then on disk.

    Each picture goes through the tower alone: its features are a function of the picture, whatever shares its batch
    and whatever was kept, so that a resumed run computes the same bits. What came first stays: rows come round in
    another order each epoch, so nothing that could be dropped is needed later than the rest.

    They are kept in the host's memory, also where the base is elsewhere: to copy a picture's takes microseconds.

    Args:
        model: the base.
        max_bytes: most memory for them.
        files: where they are kept from job to job; None keeps them in memory alone.
        about: all that they depend on beside the picture, and the tenant whose they are; names them in `files`.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        max_bytes: int,
        files: FeatureFiles | None = None,
        about: Mapping[str, str] | None = None,
    ) -> None:
        self._model = model
        self._room_bytes = max_bytes
        self._files = files
        self._about = about or {}
        self._kept: dict[str, VisualFeatures] = {}
        self._lock = threading.Lock()  # whoever makes batches asks while a step is computed

    def known(self, sha256: str) -> VisualFeatures | None:
        """A picture's features where they are kept; those on disk are read now."""
        kept = self._kept.get(sha256)
        if kept is None and self._files is not None:
            kept = self._files.get(key_of(self._about, sha256))
            if kept is not None:
                self._keep(sha256, kept)
        return kept

    def of(self, pictures: Sequence[Seen]) -> VisualFeatures | None:
        """The features of a pass's pictures; None where it has none."""
        if not pictures:
            return None
        return VisualFeatures.joined([self._one(picture).to(self._model.device) for picture in pictures])

    def _one(self, picture: Seen) -> VisualFeatures:
        kept = self._kept.get(picture.sha256) or picture.features
        if kept is not None:
            return kept
        if picture.patches_P_X is None:
            raise ValueError(f"picture {picture.sha256} has neither patches nor features")
        with torch.no_grad():
            patches_P_X = picture.patches_P_X.to(self._model.device, self._model.dtype)
            features = self._model.see(patches_P_X, [picture.grid]).to("cpu")
        self._keep(picture.sha256, features)
        if self._files is not None:
            self._files.put(key_of(self._about, picture.sha256), features)
        return features

    def _keep(self, sha256: str, features: VisualFeatures) -> None:
        size_bytes = sum(level.nbytes for level in (features.tokens_M_D, *features.deepstack_M_D))
        with self._lock:
            if sha256 not in self._kept and size_bytes <= self._room_bytes:
                self._room_bytes -= size_bytes
                self._kept[sha256] = features


def trained_features(
    model: VisionLanguageModel, pictures: Sequence[Seen], adapters: Adapters | None
) -> VisualFeatures | None:
    """The features of a pass's pictures under a tower that wears an adapter; gradients flow."""
    patches = [picture.patches_P_X for picture in pictures if picture.patches_P_X is not None]
    if not patches:
        return None
    patches_P_X = torch.cat(patches).to(model.device, model.dtype)
    return model.see(patches_P_X, [picture.grid for picture in pictures], adapters)
