"""What the registry says is served: each tenant's adapters, their aliases and the split of their traffic.

Owns the replica's copy and the choice of a version. How it comes here and is kept is the follower's matter.
"""

import hashlib
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from veneer_rpc.errors import NotFound
from veneer_rpc.names import AdapterAliasName, AdapterName, AdapterVersionName

PRODUCTION = "production"
_SHOWN = 8

AdapterRef = AdapterName | AdapterAliasName | AdapterVersionName


@dataclass(frozen=True, slots=True)
class Release:
    """One immutable version of one tenant's adapter; the digest is its identity."""

    tenant: str
    version: AdapterVersionName
    digest: str


@dataclass(frozen=True, slots=True)
class Split:
    """Sends a share, 0 to 1, of the requests that name the adapter alone to another alias."""

    alias: str
    share: float


@dataclass(frozen=True, slots=True)
class Served:
    """What is known of one adapter."""

    tenant: str
    adapter: str
    aliases: dict[str, Release] = field(default_factory=dict)
    split: Split | None = None
    preload: bool = False


class Registry:
    """The copy. Versions that had an alias once, or were asked for by number, are remembered beside the aliases."""

    def __init__(self, revision: int = 0, served: Iterable[Served] = (), known: Iterable[Release] = ()) -> None:
        self.revision = revision
        self._served = {(each.tenant, each.adapter): each for each in served}
        self._known: dict[tuple[str, AdapterVersionName], Release] = {}
        for release in known:
            self.learn(release)
        self._learn_aliased()

    @property
    def served(self) -> Iterator[Served]:
        """All adapters."""
        return iter(self._served.values())

    @property
    def known(self) -> Iterator[Release]:
        """All versions whose digest is known."""
        return iter(self._known.values())

    def replace(self, revision: int, served: Iterable[Served]) -> None:
        """Takes a snapshot: what is not in it is gone."""
        self.revision = revision
        self._served = {(each.tenant, each.adapter): each for each in served}
        self._known = {key: release for key, release in self._known.items() if (key[0], key[1].adapter) in self._served}
        self._learn_aliased()

    def change(self, revision: int, served: Iterable[Served], gone: Iterable[tuple[str, str]]) -> None:
        """Takes a change: adapters as they are now, and (tenant, adapter) of those that were deleted."""
        self.revision = revision
        for each in served:
            self._served[each.tenant, each.adapter] = each
        for tenant, adapter in gone:
            self._served.pop((tenant, adapter), None)
            for key in [key for key in self._known if key[0] == tenant and key[1].adapter == adapter]:
                del self._known[key]
        self._learn_aliased()

    def learn(self, release: Release) -> None:
        """Remembers a version that was asked for by number."""
        self._known[release.tenant, release.version] = release

    def forget(self, tenant: str, version: AdapterVersionName) -> None:
        """The version is gone."""
        self._known.pop((tenant, version), None)

    def find(self, tenant: str, version: AdapterVersionName) -> Release | None:
        """The version, if its digest is known."""
        return self._known.get((tenant, version))

    def is_aliased(self, release: Release) -> bool:
        """Whether an alias points at it: then it exists."""
        served = self._served.get((release.tenant, release.version.adapter))
        return served is not None and release in served.aliases.values()

    def resolve(self, tenant: str, name: AdapterName | AdapterAliasName, routing_key: str) -> Release:
        """The version that answers now.

        Args:
            tenant: who asks.
            name: the adapter alone (its traffic split decides, else `production`), or with an alias.
            routing_key: always falls on the same side of the split; empty for a draw.

        Raises:
            NotFound: there is none; the text says what there is.
        """
        served = self._served.get((tenant, name.adapter))
        if served is None:
            raise self.unknown(tenant, name)
        alias = name.alias if isinstance(name, AdapterAliasName) else _alias(served, routing_key)
        release = served.aliases.get(alias)
        if release is None:
            there = ", ".join(sorted(served.aliases)[:_SHOWN]) or "none yet"
            raise NotFound(
                "ALIAS_UNKNOWN",
                f"adapters/{name.adapter} has no alias {alias}; there is: {there}",
                resource=str(AdapterAliasName(name.adapter, alias)),
            )
        return release

    def unknown(self, tenant: str, name: AdapterRef) -> NotFound:
        """The error for a name that stands for nothing here."""
        served = self._served.get((tenant, name.adapter))
        if served is not None:
            there = ", ".join(
                f"{alias} = {each.version.version}" for alias, each in sorted(served.aliases.items())[:_SHOWN]
            )
            return NotFound("VERSION_UNKNOWN", f"there is no {name}; aliases: {there or 'none'}", resource=str(name))
        own = sorted(adapter for owner, adapter in self._served if owner == tenant)
        more = f" and {len(own) - _SHOWN} more" if len(own) > _SHOWN else ""
        there = ", ".join(f"adapters/{adapter}" for adapter in own[:_SHOWN]) or "none"
        return NotFound("ADAPTER_UNKNOWN", f"there is no {name}; there is: {there}{more}", resource=str(name))

    def _learn_aliased(self) -> None:
        for served in self._served.values():
            for release in served.aliases.values():
                self.learn(release)


def _alias(served: Served, routing_key: str) -> str:
    split = served.split
    if split is None or split.alias not in served.aliases:
        return PRODUCTION
    return split.alias if _place(served, routing_key) < split.share else PRODUCTION


def _place(served: Served, routing_key: str) -> float:
    """A key's fixed place in [0, 1): a share that grows keeps those that it has."""
    if not routing_key:
        return secrets.randbelow(1 << 53) / (1 << 53)
    text = "\0".join((served.tenant, served.adapter, routing_key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / (1 << 48)
