"""Adapters as their owners see them: create, look at, promote, roll back, delete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from veneer_rpc.errors import Aborted, FailedPrecondition, NotFound, ResourceExhausted, Violation, invalid, violations
from veneer_rpc.idempotency import RequestKey
from veneer_rpc.names import AdapterName, AdapterVersionName, ModelName
from veneer_trainer.domain import gate
from veneer_trainer.domain.adapters import (
    MAX_ALIASES,
    PRODUCTION,
    Adapter,
    AdapterVersion,
    AliasMove,
    Settings,
    TrafficSplit,
    check_deletable,
    check_settings,
    checked_alias,
    checked_reason,
    settings_of,
    version_before,
    version_unknown,
)
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.requests import Request
from veneer_trainer.ports import ModelCatalog, Requests
from veneer_trainer.registry_ports import AdapterFolders, OpenFiles, RegistryStore

SETTABLE = ("display_name", "labels", "traffic_split", "preload")


@dataclass(frozen=True, slots=True)
class Promotion:
    """An alias to move: `condition` is a gate's text, `expected` what the alias must point at now (None: anything)."""

    version: AdapterVersionName
    alias: str = ""
    condition: str = ""
    expected: int | None = None
    reason: str = ""


class Adapters:
    """The use cases of AdapterService that concern one tenant's adapters.

    Args:
        store: adapters and versions.
        folders: their files.
        catalog: the bases.
        requests: what repeated requests returned.
        users: names of unfinished work that names an adapter, or one version of it.
        figures: what evaluations say of two versions, for gates: see `gate.Figures`.
    """

    def __init__(
        self,
        store: RegistryStore,
        folders: AdapterFolders,
        catalog: ModelCatalog,
        requests: Requests,
        users: Callable[[str, AdapterName | AdapterVersionName], list[str]],
        figures: Callable[[str, str, str, str], tuple[float | None, float | None]],
    ) -> None:
        self._store = store
        self._folders = folders
        self._catalog = catalog
        self._requests = requests
        self._users = users
        self._figures = figures

    def create(self, request: Request, name: AdapterName, model: ModelName, settings: Settings) -> Adapter:
        """Creates an adapter without versions.

        Raises:
            NotFound: the base.
            InvalidArgument: the settings; an adapter without versions has no alias to split traffic with.
            AlreadyExists: the name is taken, or the request id came with another body.
        """
        self._catalog.get(model)
        with violations() as found:
            check_settings(settings, (), found)
        return self._once(request, name, lambda: self._store.create(request.tenant, name, model, settings))

    def get(self, tenant: str, name: AdapterName) -> Adapter:
        """Returns an adapter; raises NotFound."""
        return self._store.get(tenant, name)

    def page(self, tenant: str, after: str, limit: int, model: str) -> list[Adapter]:
        """Returns adapters by name, after an id."""
        return self._store.page(tenant, after, limit, model)

    def update(
        self, request: Request, name: AdapterName, settings: Settings, fields: tuple[str, ...], etag: str
    ) -> Adapter:
        """Changes some of SETTABLE.

        Raises:
            NotFound, Aborted: the adapter; ETAG_STALE.
            InvalidArgument: unknown fields, or their values.
        """
        wrong = [Violation("update_mask", "FIELD_UNKNOWN", f"{name[:80]!r}") for name in fields if name not in SETTABLE]
        if wrong or not fields:
            text = f"must name some of {', '.join(SETTABLE)}"
            raise invalid(*(wrong or [Violation("update_mask", "REQUIRED", text)]))

        def act() -> Adapter:
            adapter = self._store.get(request.tenant, name)
            adapter.check_etag(etag)
            merged = replace(settings_of(adapter), **{field: getattr(settings, field) for field in fields})
            with violations() as found:
                check_settings(merged, adapter.aliases, found)
            changed = self._store.change(adapter, merged)
            before, after = adapter.traffic_split, merged.traffic_split
            return changed if before == after else self._record_split(changed, before, after, request.actor)

        return self._once(request, name, act)

    def _record_split(
        self, adapter: Adapter, before: TrafficSplit | None, after: TrafficSplit | None, actor: str
    ) -> Adapter:
        """Has the history say who gave or took a share; the alias stays where it is."""
        if before is not None and (after is None or after.alias != before.alias):
            number, reason = adapter.aliases[before.alias], "takes no share of the requests any more"
            adapter = self._store.move(adapter, before.alias, number, actor, reason)
        if after is not None:
            number, reason = adapter.aliases[after.alias], f"takes {100 * after.share:.4g} % of the requests"
            adapter = self._store.move(adapter, after.alias, number, actor, reason)
        return adapter

    def delete(self, tenant: str, name: AdapterName, etag: str) -> None:
        """Deletes an adapter and its versions.

        Raises:
            NotFound, Aborted: as `update`.
            FailedPrecondition: ADAPTER_IN_USE: an alias or an unfinished job names one.
        """
        with self._store.together():
            adapter = self._store.get(tenant, name)
            adapter.check_etag(etag)
            users = [f"alias {alias}" for alias in adapter.aliases] + self._users(tenant, name)
            if users:
                text = f"{name} is named by {', '.join(users[:10])}"
                raise FailedPrecondition("ADAPTER_IN_USE", text, resource=str(name))
            uids = self._store.delete(adapter)
        for uid in uids:
            self._folders.forget(uid)

    def resolve(self, tenant: str, adapter: AdapterName, version: str) -> AdapterVersionName:
        """Returns the name of a version that is given by number or alias.

        Raises:
            NotFound: the adapter.
            FailedPrecondition: ALIAS_UNSET: it points at nothing.
        """
        if version.isdigit():
            return AdapterVersionName.parse(f"{adapter}/versions/{version}")
        alias = checked_alias(version, "name")
        number = self._store.get(tenant, adapter).aliases.get(alias, 0)
        if not number:
            raise FailedPrecondition("ALIAS_UNSET", f"{adapter} has no alias {alias}", resource=str(adapter))
        return AdapterVersionName(adapter.adapter, number)

    def version(self, tenant: str, name: AdapterVersionName) -> AdapterVersion:
        """Returns a version; raises NotFound."""
        return self._store.version(tenant, name)

    def versions(self, tenant: str, name: AdapterName, before: int | None, limit: int) -> list[AdapterVersion]:
        """Returns versions, newest first; raises NotFound."""
        return self._store.versions(tenant, name, before, limit)

    def delete_version(self, tenant: str, name: AdapterVersionName) -> None:
        """Deletes a version; raises NotFound, and FailedPrecondition while something names it."""
        with self._store.together():
            version = self._store.version(tenant, name)
            check_deletable(version, self._users(tenant, name))
            self._store.delete_version(tenant, version)
        self._folders.forget(version.uid)

    def open(
        self, tenant: str, name: AdapterVersionName, paths: tuple[str, ...], for_work: bool = False
    ) -> tuple[tuple[StoredFile, ...], OpenFiles]:
        """Opens files of a version, sorted by path: all for no paths.

        Args:
            tenant: who owns it.
            name: the version.
            paths: of the files wanted.
            for_work: only where unfinished work names the version.

        Raises:
            NotFound: the version, or a path that it does not have.
        """
        version = self._store.version(tenant, name)
        if for_work and not self._users(tenant, name):
            raise version_unknown(name)
        files = chosen(version.content.files, paths, str(name))
        return files, self._folders.read(version.uid, files)

    def promote(self, request: Request, promotion: Promotion) -> Adapter:
        """Points an alias at a version.

        Raises:
            InvalidArgument: alias, reason or condition are malformed.
            NotFound: the version.
            Aborted: ALIAS_MOVED: it does not point at what was expected.
            ResourceExhausted: TOO_MANY_ALIASES.
            FailedPrecondition: GATE_NOT_MET, with the figures.
        """
        alias, reason = checked_alias(promotion.alias), checked_reason(promotion.reason)
        comparisons, name = gate.parse(promotion.condition), promotion.version
        parent = AdapterName(name.adapter)

        def act() -> Adapter:
            self._store.version(request.tenant, name)
            adapter = self._store.get(request.tenant, parent)
            now = adapter.aliases.get(alias, 0)
            if promotion.expected not in (None, now):
                raise Aborted(
                    "ALIAS_MOVED",
                    f"{alias} points at version {now}, not at {promotion.expected}",
                    metadata={"version": str(now)},
                    resource=str(parent),
                )

            def figures(metric: str, other: str) -> tuple[float | None, float | None]:
                number = adapter.aliases.get(other, 0)
                against = str(AdapterVersionName(name.adapter, number)) if number else ""
                return self._figures(request.tenant, metric, str(name), against)

            gate.check(comparisons, figures)
            if now == name.version:
                return adapter
            if not now and len(adapter.aliases) >= MAX_ALIASES:
                text = f"{parent} has {len(adapter.aliases)} aliases, the limit: remove one that nobody uses"
                raise ResourceExhausted("TOO_MANY_ALIASES", text, metadata={"limit": str(MAX_ALIASES)})
            return self._store.move(adapter, alias, name.version, request.actor, reason)

        return self._once(request, parent, act)

    def rollback(self, request: Request, name: AdapterName, alias: str, reason: str) -> Adapter:
        """Points an alias back at the version before.

        Raises:
            NotFound: the adapter.
            FailedPrecondition: NOTHING_BEFORE.
        """
        alias, reason = checked_alias(alias), checked_reason(reason)

        def act() -> Adapter:
            adapter = self._store.get(request.tenant, name)
            number = version_before(self._store.moves_of(adapter, alias), self._store.numbers(adapter))
            if not number:
                raise FailedPrecondition(
                    "NOTHING_BEFORE", f"there is no version before for the alias {alias}", resource=str(name)
                )
            return self._store.move(adapter, alias, number, request.actor, reason, back=True)

        return self._once(request, name, act)

    def delete_alias(self, request: Request, name: AdapterName, alias: str) -> Adapter:
        """Removes an alias.

        Raises:
            NotFound: the adapter.
            FailedPrecondition: ALIAS_IN_USE: a traffic split names it, or needs production; ALIAS_UNSET.
        """
        if not alias:
            raise invalid(Violation("alias", "REQUIRED", "must be given"))
        alias = checked_alias(alias)

        def act() -> Adapter:
            adapter = self._store.get(request.tenant, name)
            if alias not in adapter.aliases:
                raise FailedPrecondition("ALIAS_UNSET", f"{name} has no alias {alias}", resource=str(name))
            split = adapter.traffic_split
            if split is not None and alias in (split.alias, PRODUCTION):
                raise FailedPrecondition("ALIAS_IN_USE", f"a traffic split needs {alias}", resource=str(name))
            return self._store.move(adapter, alias, 0, request.actor, "")

        return self._once(request, name, act)

    def moves(self, tenant: str, name: AdapterName, before: int | None, limit: int) -> list[AliasMove]:
        """Returns who moved which alias, newest first; raises NotFound."""
        return self._store.moves(self._store.get(tenant, name), before, limit)

    def _once(self, request: Request, name: AdapterName, act: Callable[[], Adapter]) -> Adapter:
        """Acts in one transaction, once for a request id, and returns the adapter as it is now."""
        with self._store.together():
            if request.key is None:
                return act()
            key: RequestKey = request.key
            self._requests.once(key, request.body_sha256, lambda: act().uid.encode())
            return self._store.get(request.tenant, name)


def chosen(files: tuple[StoredFile, ...], paths: tuple[str, ...], owner: str) -> tuple[StoredFile, ...]:
    """Returns the named files in their own order, all for no names; raises NotFound for one that is not there."""
    known = {file.path for file in files}
    for path in paths:
        if path not in known:
            raise NotFound("FILE_UNKNOWN", f"{owner} has no file {path[:80]!r}", resource=owner)
    return tuple(file for file in files if not paths or file.path in paths)
