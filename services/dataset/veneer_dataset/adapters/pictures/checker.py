"""Checks a tenant's pictures: each content is decoded once, and what it told is remembered."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from veneer_dataset.adapters.pictures.frames import Job
from veneer_dataset.adapters.pictures.pool import DecoderDied, PicturePool
from veneer_dataset.domain.blobs import Blob, Blobs
from veneer_dataset.domain.findings import shown
from veneer_dataset.domain.pictures import PictureFacts
from veneer_dataset.ports import FactStore

MAX_PICTURE_BYTES = 64 * 1024 * 1024

_AT_ONCE = 256


class DecodingChecker:
    """A PictureChecker of one tenant."""

    def __init__(self, tenant: str, blobs: Blobs, facts: FactStore, pool: PicturePool) -> None:
        self._tenant = tenant
        self._blobs = blobs
        self._facts = facts
        self._pool = pool

    def check(self, digests: Iterable[str], inline_folder: Path) -> Iterator[tuple[int, PictureFacts]]:
        """See PictureChecker."""
        numbered = enumerate(digests)
        while some := list(islice(numbered, _AT_ONCE)):
            wanted = [digest for _, digest in some]
            inline = {digest for digest in wanted if (inline_folder / digest).exists()}
            blobs = self._blobs.known(self._tenant, wanted)
            known = self._facts.find(self._tenant, wanted)
            unknown = []
            for index, digest in some:
                if digest not in inline and digest not in blobs:
                    yield index, PictureFacts(code="PICTURE_NOT_UPLOADED", found=digest)
                elif digest in known:
                    yield index, known[digest]
                else:
                    unknown.append((index, inline_folder / digest if digest in inline else blobs[digest]))
            indices = dict(some)
            fresh: dict[str, PictureFacts] = {}
            for (index, _), facts in zip(
                unknown, self._pool.map(self._decode, [source for _, source in unknown]), strict=True
            ):
                if facts.code != "PICTURE_DECODER_DIED":  # that may have been the machine's fault
                    fresh[indices[index]] = facts
                yield index, facts
            self._facts.add(self._tenant, fresh)

    def _decode(self, source: Path | Blob) -> PictureFacts:
        size_bytes = source.stat().st_size if isinstance(source, Path) else source.size_bytes
        if size_bytes > MAX_PICTURE_BYTES:
            return PictureFacts(code="PICTURE_OVER_LIMIT", found=f"{size_bytes} bytes")
        data = source.read_bytes() if isinstance(source, Path) else b"".join(self._blobs.read(source))
        try:
            outcome, _ = self._pool.run(Job(), data)
        except DecoderDied:
            return PictureFacts(code="PICTURE_DECODER_DIED", found="the decoder was ended by its limits")
        if outcome.code:
            return PictureFacts(code=outcome.code, found=shown(outcome.found))
        return PictureFacts(outcome.width, outcome.height, outcome.perceptual_hash)
