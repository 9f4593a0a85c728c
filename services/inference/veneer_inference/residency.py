"""Which adapters are in the engine, for whom, and how they come and go.

A version is downloaded, checked against the base's processing contract and loaded beside those that serve; what
answers with another version goes on. What nobody names any more goes once no request uses it. How many fit is the
engine's matter.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog

from veneer_inference.adapters.adapter_source import AdapterSource, apart, invalid_adapter
from veneer_inference.base import Base
from veneer_inference.domain.registry import Release
from veneer_inference.ports import EngineError
from veneer_processing import ContractMismatchError, Processor
from veneer_rpc.errors import FailedPrecondition, VeneerError
from veneer_rpc.names import AdapterVersionName

_REFUSAL_KEPT_S = 5.0
_log = structlog.get_logger(__name__)

Key = tuple[str, AdapterVersionName]


@dataclass(slots=True, eq=False)
class Holding:
    """One adapter in one engine, under every name by which it was asked for.

    Attributes:
        base: whose engine holds it.
        digest: which adapter.
        processor: of its own processing contract.
        size_bytes: of its tensors.
        load_time_s: when it was loaded, seconds since 1970.
        last_uses_s: when a request used each name last; None before the first.
    """

    base: Base
    digest: str
    processor: Processor
    size_bytes: int
    load_time_s: float = field(default_factory=time.time)
    last_uses_s: dict[Key, float | None] = field(default_factory=dict)

    def use(self, release: Release) -> None:
        """Notes that a request begins to use it."""
        self.last_uses_s[release.tenant, release.version] = time.time()


class Residency:
    """The adapters of this replica.

    Args:
        base: the living base; raises Unavailable where there is none.
        source: fetches what is not on the disk.
    """

    def __init__(self, base: Callable[[], Base], source: AdapterSource) -> None:
        self._base = base
        self._source = source
        self._holdings: dict[str, Holding] = {}
        self._loads: dict[str, asyncio.Task[Holding]] = {}
        self._loading: dict[str, set[Key]] = {}
        self._refusals: dict[str, tuple[float, VeneerError]] = {}
        self._dropped: set[Key] = set()

    @property
    def held(self) -> Iterator[Release]:
        """Every version that the living engine holds."""
        for holding in self._living():
            for tenant, version in holding.last_uses_s:
                yield Release(tenant, version, holding.digest)

    def holdings(self, tenant: str) -> dict[AdapterVersionName, Holding]:
        """A tenant's own versions."""
        return {
            version: holding for holding in self._living() for owner, version in holding.last_uses_s if owner == tenant
        }

    def loading(self, tenant: str) -> dict[AdapterVersionName, str]:
        """Digests of a tenant's versions that are on their way."""
        return {version: digest for digest, keys in self._loading.items() for owner, version in keys if owner == tenant}

    async def ready(self, release: Release) -> Holding:
        """The version in the engine; calls at once for one digest share one load.

        Raises:
            FailedPrecondition: it cannot be served, with the reasons.
            NotFound, Unavailable: as `AdapterSource.folder`, or the engine is being started.
        """
        base, digest = self._base(), release.digest
        key = release.tenant, release.version
        self._dropped.discard(key)
        holding = self._holdings.get(digest)
        if holding is None or not _is_held(holding, base):
            self._raise_refusal(digest)
            task = self._loads.get(digest)
            if task is None:
                task = self._loads[digest] = apart(self._load(base, release))
                task.add_done_callback(lambda _: (self._loads.pop(digest, None), self._loading.pop(digest, None)))
            self._loading.setdefault(digest, set()).add(key)
            holding = await asyncio.shield(task)
        holding.last_uses_s.setdefault(key, None)
        return holding

    async def drop(self, tenant: str, version: AdapterVersionName, *, until_asked: bool = False) -> bool:
        """Takes a name away, and the adapter with its last name; returns False where it is not held.

        Args:
            tenant: whose.
            version: which.
            until_asked: nothing but a request brings it back.
        """
        holding = self.holdings(tenant).get(version)
        if holding is None:
            return False
        del holding.last_uses_s[tenant, version]
        if until_asked:
            self._dropped.add((tenant, version))
        if not holding.last_uses_s:
            await self._unload(holding)
        return True

    def was_dropped(self, release: Release) -> bool:
        """Whether this name is to stay away until a request asks for it."""
        return (release.tenant, release.version) in self._dropped

    async def discard(self, digest: str) -> None:
        """Deletes an adapter from the disk that nobody names any more."""
        await self._source.discard(digest)

    def lost(self, holding: Holding) -> None:
        """The engine says that it does not hold this; the next request loads it again."""
        if self._holdings.get(holding.digest) is holding:
            del self._holdings[holding.digest]

    def _living(self) -> Iterator[Holding]:
        try:
            base = self._base()
        except VeneerError:
            return iter(())
        return (each for each in list(self._holdings.values()) if _is_held(each, base))

    async def _load(self, base: Base, release: Release) -> Holding:
        try:
            holding = await self._load_once(base, release)
        except FailedPrecondition as error:
            _log.warning("adapter refused; fetching it once more", digest=release.digest, problem=error.message)
            await self._source.discard(release.digest)
            try:
                holding = await self._load_once(base, release)
            except FailedPrecondition as again:
                self._refusals[release.digest] = time.monotonic() + _REFUSAL_KEPT_S, again
                await self._source.discard(release.digest)
                raise
        self._holdings[release.digest] = holding
        _log.info("adapter loaded", version=str(release.version), digest=release.digest, bytes=holding.size_bytes)
        await self._source.trim({*self._loads, *(each.digest for each in self._living())})
        return holding

    async def _load_once(self, base: Base, release: Release) -> Holding:
        folder = await self._source.folder(release)
        try:
            processor = base.processor.under(folder.contract)
        except ContractMismatchError as error:
            raise FailedPrecondition(
                "CONTRACT_MISMATCH",
                f"{release.version} was trained under another processing contract: {'; '.join(error.differences)}",
                resource=str(release.version),
            ) from error
        try:
            size_bytes = await base.engine.load_adapter(release.digest, folder.directory)
        except EngineError as error:
            if error.reason == "ADAPTER_INVALID":
                raise invalid_adapter(release.version, list(error.problems)) from error
            raise
        return Holding(base, release.digest, processor, size_bytes)

    def _raise_refusal(self, digest: str) -> None:
        until_s, error = self._refusals.pop(digest, (0.0, None))
        if error is not None and time.monotonic() < until_s:
            self._refusals[digest] = until_s, error
            raise error

    async def _unload(self, holding: Holding) -> None:
        self.lost(holding)
        try:
            await holding.base.engine.unload_adapter(holding.digest)
        except EngineError as error:
            if error.reason != "ENGINE_GONE":  # then it is gone with its engine
                raise
        _log.info("adapter dropped", digest=holding.digest)


def _is_held(holding: Holding, base: Base) -> bool:
    """Whether the living engine still has it: the engine makes room by itself."""
    return holding.base is base and any(state.digest == holding.digest for state in base.engine.stats().adapters)
