"""Brings what the replica holds to what the registry wants: loads before a request asks, drops what is gone."""

import asyncio
import time
from contextlib import suppress

import structlog

from veneer_inference.domain.registry import Registry, Release
from veneer_inference.ports import EngineError
from veneer_inference.residency import Residency
from veneer_rpc.errors import Unavailable, VeneerError

_LONGEST_WAIT_S = 300.0
_log = structlog.get_logger(__name__)


class Desired:
    """Wanted are the aliased versions of adapters that say `preload`, or of which a version is held already.

    Args:
        registry: the replica's copy.
        residency: what is held.
        every_s: how often to look, beside each `wake`; what failed is tried again then.
    """

    def __init__(self, registry: Registry, residency: Residency, every_s: float) -> None:
        self._registry = registry
        self._residency = residency
        self._every_s = every_s
        self._woken = asyncio.Event()
        self._postponed: dict[Release, tuple[float, float]] = {}
        self._drops: dict[Release, asyncio.Task[None]] = {}

    def wake(self) -> None:
        """Something has changed."""
        self._woken.set()

    async def run(self) -> None:
        """Keeps up for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._woken.wait()
            self._woken.clear()
            self._drop_gone()
            wanted = self._wanted()
            self._postponed = {each: when for each, when in self._postponed.items() if each in wanted}
            for release in wanted:
                if self._postponed.get(release, (0.0, 0.0))[0] <= time.monotonic():
                    await self._load(release)

    def _wanted(self) -> list[Release]:
        held = set(self._residency.held)
        used = {(release.tenant, release.version.adapter) for release in held}
        return [
            release
            for served in self._registry.served
            if served.preload or (served.tenant, served.adapter) in used
            for release in served.aliases.values()
            if release not in held and not self._residency.was_dropped(release)
        ]

    async def _load(self, release: Release) -> None:
        try:
            await self._residency.ready(release)
        except Unavailable as error:  # which passes: the next round tries again
            _log.warning("not loaded ahead", version=str(release.version), reason=error.reason, problem=str(error))
        except (VeneerError, EngineError) as error:
            wait_s = min(self._postponed.get(release, (0.0, self._every_s / 2))[1] * 2, _LONGEST_WAIT_S)
            self._postponed[release] = time.monotonic() + wait_s, wait_s
            _log.warning("not loaded ahead", version=str(release.version), reason=error.reason, problem=str(error))
        except Exception:
            _log.exception("not loaded ahead", version=str(release.version))

    def _drop_gone(self) -> None:
        known = set(self._registry.known)
        digests = {release.digest for release in known}
        for release in [each for each in self._residency.held if each not in known and each not in self._drops]:
            # Apart: it waits for the last request that uses the version.
            task = self._drops[release] = asyncio.create_task(self._drop(release, release.digest not in digests))
            task.add_done_callback(lambda _, release=release: self._drops.pop(release, None))  # type: ignore[misc]

    async def _drop(self, release: Release, from_disk: bool) -> None:
        try:
            await self._residency.drop(release.tenant, release.version)
            if from_disk:
                await self._residency.discard(release.digest)
        except Exception:
            _log.exception("not dropped", version=str(release.version))
