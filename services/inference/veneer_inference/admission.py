"""From the name in a request to the one version that answers it, pinned here and never changed after."""

import asyncio
import time

import structlog

from veneer_inference.adapters.adapter_source import AdapterSource, trainer_away
from veneer_inference.adapters.follower import Follower
from veneer_inference.domain.registry import AdapterRef, Registry, Release
from veneer_rpc.errors import NotFound, Unavailable, VeneerError
from veneer_rpc.names import AdapterVersionName

_log = structlog.get_logger(__name__)


class Admission:
    """Finds versions, and asks the trainer before it says that there is none.

    Args:
        registry: the replica's copy.
        follower: brings the copy up to date.
        source: knows whether a version exists that no alias points at.
        wait_s: for the trainer, at most.
        recheck_s: how long such a version is taken to exist without asking again.
    """

    def __init__(
        self,
        registry: Registry,
        follower: Follower,
        source: AdapterSource,
        wait_s: float,
        recheck_s: float,
    ) -> None:
        self._registry = registry
        self._follower = follower
        self._source = source
        self._wait_s = wait_s
        self._recheck_s = recheck_s
        self._checked_s: dict[Release, float] = {}
        self._asking = asyncio.Lock()
        self._asked_s = 0.0

    async def pin(self, tenant: str, name: AdapterRef, routing_key: str) -> Release:
        """The version that answers a request of a tenant.

        Raises:
            NotFound: the tenant has no such adapter, alias or version; the text says what there is.
            Unavailable: it is not known here, and the trainer does not answer.
        """
        if isinstance(name, AdapterVersionName):
            return await self._version(tenant, name)
        try:
            return self._registry.resolve(tenant, name, routing_key)
        except NotFound:
            await self._catch_up()
            return self._registry.resolve(tenant, name, routing_key)

    async def _version(self, tenant: str, name: AdapterVersionName) -> Release:
        found = self._registry.find(tenant, name)
        if found is not None and (self._registry.is_aliased(found) or self._fresh(found)):
            return found
        if found is None:
            try:
                folder = await self._source.folder(Release(tenant, name, ""))
            except NotFound:
                raise self._registry.unknown(tenant, name) from None
            found = Release(tenant, name, folder.digest)
            self._registry.learn(found)
            self._follower.save()
        else:
            try:
                if not await self._source.exists(found):
                    self._registry.forget(tenant, name)
                    self._follower.save()
                    raise self._registry.unknown(tenant, name)
            except Unavailable as error:
                _log.info("served without asking the trainer", version=str(name), reason=error.reason)
        self._checked_s[found] = time.monotonic()
        return found

    def _fresh(self, release: Release) -> bool:
        return time.monotonic() - self._checked_s.get(release, float("-inf")) < self._recheck_s

    async def _catch_up(self) -> None:
        """Brings the copy to the trainer's present revision; those who wait share the next round."""
        wanted_s = time.monotonic()
        try:
            async with asyncio.timeout(self._wait_s), self._asking:
                if self._asked_s >= wanted_s:
                    return
                began_s = time.monotonic()
                await self._follower.catch_up()
                self._asked_s = began_s
        except TimeoutError:
            raise Unavailable(
                "REGISTRY_UNAVAILABLE",
                f"the registry of adapters could not be reached within {self._wait_s:g} s",
                retry_after_s=self._wait_s,
            ) from None
        except VeneerError as error:
            raise trainer_away(error) from error
