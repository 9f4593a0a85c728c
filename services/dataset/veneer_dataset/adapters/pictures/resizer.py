"""Resized pictures: from the cache, or made by a decoding child and put there."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from veneer_dataset.adapters.pictures.cache import PixelCache
from veneer_dataset.adapters.pictures.frames import Job
from veneer_dataset.adapters.pictures.pool import DecoderDied, PicturePool
from veneer_dataset.domain.blobs import Blobs
from veneer_processing.pixels import PixelSettings
from veneer_rpc.errors import DataLoss


class CachingResizer:
    """A PictureResizer."""

    def __init__(self, blobs: Blobs, pool: PicturePool, cache: PixelCache) -> None:
        self._blobs = blobs
        self._pool = pool
        self._cache = cache

    def resized(
        self, tenant: str, digests: Sequence[str], pixels: PixelSettings, contract_digest: str
    ) -> Sequence[NDArray[np.uint8]]:
        """See PictureResizer."""
        bounds = pixels.bounds
        job = Job(
            (
                bounds.min_pixels,
                bounds.max_pixels,
                pixels.patch_size,
                pixels.merge_size,
                pixels.temporal_patch_size,
            )
        )

        def one(digest: str) -> NDArray[np.uint8]:
            key = (tenant, digest, contract_digest)
            found = self._cache.get(key)
            if found is None:
                found = self._make(tenant, digest, job)
                self._cache.put(key, found)
            return found

        return list(self._pool.map(one, digests))

    def _make(self, tenant: str, digest: str, job: Job) -> NDArray[np.uint8]:
        data = b"".join(self._blobs.read(self._blobs.find(tenant, [digest])[0]))
        try:
            outcome, rgb = self._pool.run(job, data)
        except DecoderDied:
            raise DataLoss("PICTURE_UNREADABLE", f"the decoder died over picture {digest}") from None
        if outcome.code:
            raise DataLoss("PICTURE_UNREADABLE", f"picture {digest}: {outcome.found}")
        return np.frombuffer(rgb, np.uint8).reshape(outcome.height, outcome.width, 3)
