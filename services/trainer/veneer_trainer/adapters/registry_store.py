"""The RegistryStore in SQL: adapters, versions, aliases and who moved them, under one growing revision."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, and_, delete, func, insert, select, update

from veneer_rpc.errors import AlreadyExists, NotFound
from veneer_rpc.names import AdapterName, AdapterVersionName, ModelName
from veneer_trainer.adapters.database import Database, Schema
from veneer_trainer.domain.adapters import (
    Adapter,
    AdapterVersion,
    AliasMove,
    Inspected,
    Lineage,
    NewVersion,
    RegistryChanges,
    ServedAdapter,
    ServedAlias,
    Settings,
    TrafficSplit,
    version_unknown,
)
from veneer_trainer.domain.jobs import Progress

SCHEMA = Schema(
    "registry",
    (
        (
            """CREATE TABLE adapters (
                uid TEXT PRIMARY KEY, tenant TEXT NOT NULL, id TEXT NOT NULL, model TEXT NOT NULL,
                display_name TEXT NOT NULL, labels TEXT NOT NULL, traffic_split TEXT NOT NULL, preload BOOLEAN NOT NULL,
                latest_version BIGINT NOT NULL, revision BIGINT NOT NULL,
                created_s DOUBLE PRECISION NOT NULL, updated_s DOUBLE PRECISION NOT NULL,
                UNIQUE (tenant, id))""",
            "CREATE INDEX adapters_by_revision ON adapters (revision)",
            """CREATE TABLE adapter_versions (
                uid TEXT PRIMARY KEY, adapter TEXT NOT NULL REFERENCES adapters (uid) ON DELETE CASCADE,
                number BIGINT NOT NULL, job TEXT UNIQUE, digest TEXT NOT NULL, content TEXT NOT NULL,
                lineage TEXT NOT NULL, progress TEXT NOT NULL, created_s DOUBLE PRECISION NOT NULL,
                UNIQUE (adapter, number))""",
            """CREATE TABLE adapter_aliases (
                adapter TEXT NOT NULL REFERENCES adapters (uid) ON DELETE CASCADE, alias TEXT NOT NULL,
                number BIGINT NOT NULL, PRIMARY KEY (adapter, alias),
                FOREIGN KEY (adapter, number) REFERENCES adapter_versions (adapter, number))""",
            """CREATE TABLE alias_moves (
                adapter TEXT NOT NULL REFERENCES adapters (uid) ON DELETE CASCADE, sequence BIGINT NOT NULL,
                alias TEXT NOT NULL, from_version BIGINT NOT NULL, to_version BIGINT NOT NULL, actor TEXT NOT NULL,
                reason TEXT NOT NULL, moved_s DOUBLE PRECISION NOT NULL, back BOOLEAN NOT NULL,
                PRIMARY KEY (adapter, sequence))""",
            # What a deleted adapter leaves: watchers hear of it, and its version numbers are not given again.
            """CREATE TABLE deleted_adapters (
                tenant TEXT NOT NULL, id TEXT NOT NULL, model TEXT NOT NULL, latest_version BIGINT NOT NULL,
                revision BIGINT NOT NULL, PRIMARY KEY (tenant, id))""",
            "CREATE TABLE registry_revision (value BIGINT NOT NULL)",
            "INSERT INTO registry_revision VALUES (0)",
        ),
    ),
)

_T = TypeVar("_T")


class SqlRegistry:
    """The RegistryStore of one database; see `registry_ports.RegistryStore` for what each method promises.

    Args:
        database: where SCHEMA is.
        on_change: called after each change is durable.
        clock: seconds since 1970, for people.
    """

    def __init__(
        self,
        database: Database,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._on_change = on_change
        self._clock = clock
        self._adapters = database.table("adapters")
        self._versions = database.table("adapter_versions")
        self._aliases = database.table("adapter_aliases")
        self._moves = database.table("alias_moves")
        self._deleted = database.table("deleted_adapters")
        self._revision = database.table("registry_revision")

    def together(self) -> AbstractContextManager[Any]:
        """See RegistryStore."""
        return self._database.write()

    def create(self, tenant: str, name: AdapterName, model: ModelName, settings: Settings) -> Adapter:
        """See RegistryStore."""
        deleted, now_s = self._deleted.c, self._clock()
        with self._database.write() as connection:
            if self.find(tenant, name) is not None:
                raise AlreadyExists("NAME_TAKEN", f"{name} exists", resource=str(name))
            before = select(deleted.latest_version).where(deleted.tenant == tenant, deleted.id == name.adapter)
            latest_version = connection.scalar(before) or 0
            values = {
                "uid": str(uuid.uuid4()), "tenant": tenant, "id": name.adapter, "model": str(model),
                "latest_version": latest_version, "revision": self._next_revision(connection),
                "created_s": now_s, "updated_s": now_s,
            }  # fmt: skip
            connection.execute(insert(self._adapters).values(values | _settings(settings)))
            return self.get(tenant, name)

    def find(self, tenant: str, name: AdapterName) -> Adapter | None:
        """See RegistryStore."""
        columns = self._adapters.c
        return next(iter(self._select(columns.tenant == tenant, columns.id == name.adapter)), None)

    def get(self, tenant: str, name: AdapterName) -> Adapter:
        """See RegistryStore."""
        adapter = self.find(tenant, name)
        if adapter is None:
            raise NotFound("ADAPTER_UNKNOWN", f"there is no {name}", resource=str(name))
        return adapter

    def page(self, tenant: str, after: str, limit: int, model: str = "") -> list[Adapter]:
        """See RegistryStore."""
        columns = self._adapters.c
        wanted = [columns.tenant == tenant, columns.id > after]
        return self._select(*wanted, *([columns.model == model] if model else []), order=columns.id, limit=limit)

    def change(self, adapter: Adapter, settings: Settings) -> Adapter:
        """See RegistryStore."""
        return self._change(adapter, **_settings(settings))

    def delete(self, adapter: Adapter) -> list[str]:
        """See RegistryStore."""
        with self._database.write() as connection:
            versions = self._versions.c
            uids = list(connection.scalars(select(versions.uid).where(versions.adapter == adapter.uid)))
            deleted = self._deleted.c
            mine = and_(deleted.tenant == adapter.tenant, deleted.id == adapter.name.adapter)
            connection.execute(delete(self._deleted).where(mine))
            connection.execute(
                insert(self._deleted).values(
                    tenant=adapter.tenant, id=adapter.name.adapter, model=str(adapter.model),
                    latest_version=adapter.latest_version, revision=self._next_revision(connection),
                )
            )  # fmt: skip
            connection.execute(delete(self._aliases).where(self._aliases.c.adapter == adapter.uid))
            connection.execute(delete(self._adapters).where(self._adapters.c.uid == adapter.uid))
            return uids

    def add_version(self, adapter: Adapter, new: NewVersion) -> AdapterVersion:
        """See RegistryStore."""
        with self._database.write() as connection:
            number = adapter.latest_version + 1
            self._change(adapter, latest_version=number)
            connection.execute(
                insert(self._versions).values(
                    uid=new.uid, adapter=adapter.uid, number=number, job=new.job_uid or None,
                    digest=new.content.digest, content=_json(new.content), lineage=_json(new.lineage),
                    progress=_json(new.final_progress) if new.final_progress else "", created_s=self._clock(),
                )
            )  # fmt: skip
            return self.version(adapter.tenant, AdapterVersionName(adapter.name.adapter, number))

    def version(self, tenant: str, name: AdapterVersionName) -> AdapterVersion:
        """See RegistryStore."""
        columns = self._adapters.c
        found = self._select_versions(
            columns.tenant == tenant, columns.id == name.adapter, self._versions.c.number == name.version
        )
        if not found:
            raise version_unknown(name)
        return found[0]

    def version_of_job(self, job_uid: str) -> AdapterVersion | None:
        """See RegistryStore."""
        return next(iter(self._select_versions(self._versions.c.job == job_uid)), None)

    def versions(self, tenant: str, name: AdapterName, before: int | None, limit: int) -> list[AdapterVersion]:
        """See RegistryStore."""
        adapter, columns = self.get(tenant, name), self._versions.c
        older = [] if before is None else [columns.number < before]
        return self._select_versions(columns.adapter == adapter.uid, *older, limit=limit)

    def numbers(self, adapter: Adapter) -> set[int]:
        """See RegistryStore."""
        columns = self._versions.c
        with self._database.read() as connection:
            return set(connection.scalars(select(columns.number).where(columns.adapter == adapter.uid)))

    def delete_version(self, tenant: str, version: AdapterVersion) -> None:
        """See RegistryStore."""
        with self._database.write() as connection:
            adapter = self.get(tenant, AdapterName(version.name.adapter))
            connection.execute(delete(self._versions).where(self._versions.c.uid == version.uid))
            self._change(adapter)

    def move(self, adapter: Adapter, alias: str, to: int, actor: str, reason: str, back: bool = False) -> Adapter:
        """See RegistryStore."""
        aliases, moves = self._aliases.c, self._moves.c
        with self._database.write() as connection:
            connection.execute(delete(self._aliases).where(aliases.adapter == adapter.uid, aliases.alias == alias))
            if to:
                connection.execute(insert(self._aliases).values(adapter=adapter.uid, alias=alias, number=to))
            last = connection.scalar(select(func.max(moves.sequence)).where(moves.adapter == adapter.uid)) or 0
            connection.execute(
                insert(self._moves).values(
                    adapter=adapter.uid, sequence=last + 1, alias=alias, from_version=adapter.aliases.get(alias, 0),
                    to_version=to, actor=actor, reason=reason, moved_s=self._clock(), back=back,
                )
            )  # fmt: skip
            return self._change(adapter)

    def moves(self, adapter: Adapter, before: int | None, limit: int) -> list[AliasMove]:
        """See RegistryStore."""
        columns = self._moves.c
        wanted = [columns.adapter == adapter.uid, *([] if before is None else [columns.sequence < before])]
        return self._select_moves(*wanted, order=columns.sequence.desc(), limit=limit)

    def moves_of(self, adapter: Adapter, alias: str) -> list[AliasMove]:
        """See RegistryStore."""
        columns = self._moves.c
        return self._select_moves(columns.adapter == adapter.uid, columns.alias == alias, order=columns.sequence)

    def revision(self) -> int:
        """See RegistryStore."""
        with self._database.read() as connection:
            return connection.scalar(select(self._revision.c.value)) or 0

    def changes(self, after: int, tenant: str = "", model: str = "") -> RegistryChanges:
        """See RegistryStore."""
        with self._database.read() as connection:
            revision = self.revision()
            if revision == after:
                return RegistryChanges(revision)
            adapters = self._select(*self._of(self._adapters.c, after, tenant, model), order=self._adapters.c.revision)
            digests = self._alias_digests(connection, {adapter.uid for adapter in adapters})
            deleted = self._deleted.c
            gone = select(deleted.tenant, deleted.id).where(*self._of(deleted, after, tenant, model))
            living = {(adapter.tenant, adapter.name) for adapter in adapters}
            names = [(row.tenant, AdapterName(row.id)) for row in connection.execute(gone)]
            return RegistryChanges(
                revision,
                tuple(_served(adapter, digests.get(adapter.uid, {})) for adapter in adapters),
                tuple(name for name in names if name not in living),
            )

    def version_uids(self) -> set[str]:
        """See RegistryStore."""
        with self._database.read() as connection:
            return set(connection.scalars(select(self._versions.c.uid)))

    @staticmethod
    def _of(columns: Any, after: int, tenant: str, model: str) -> list[ColumnElement[bool]]:  # noqa: ANN401  # of two tables
        wanted: list[ColumnElement[bool]] = [columns.revision > after]
        wanted += [columns.tenant == tenant] if tenant else []
        return wanted + ([columns.model == model] if model else [])

    def _alias_digests(self, connection: Connection, uids: set[str]) -> dict[str, dict[str, str]]:
        """Digest by alias by adapter."""
        aliases, versions = self._aliases.c, self._versions.c
        same = and_(aliases.adapter == versions.adapter, aliases.number == versions.number)
        query = select(aliases.adapter, aliases.alias, versions.digest).select_from(
            self._aliases.join(self._versions, same)
        )
        found: dict[str, dict[str, str]] = {}
        for row in connection.execute(query):
            if row.adapter in uids:
                found.setdefault(row.adapter, {})[row.alias] = row.digest
        return found

    def _change(self, adapter: Adapter, **values: Any) -> Adapter:  # noqa: ANN401  # columns
        with self._database.write() as connection:
            values |= {"revision": self._next_revision(connection), "updated_s": self._clock()}
            connection.execute(update(self._adapters).where(self._adapters.c.uid == adapter.uid).values(values))
            return self.get(adapter.tenant, adapter.name)

    def _next_revision(self, connection: Connection) -> int:
        connection.execute(update(self._revision).values(value=self._revision.c.value + 1))
        self._database.after_commit(self._on_change)
        return connection.scalar(select(self._revision.c.value)) or 0

    def _select(
        self,
        *wanted: ColumnElement[bool],
        order: Any = None,  # noqa: ANN401  # a column
        limit: int | None = None,
    ) -> list[Adapter]:
        with self._database.read() as connection:
            rows = list(connection.execute(select(self._adapters).where(*wanted).order_by(order).limit(limit)))
            columns = self._aliases.c
            some = columns.adapter.in_(
                [row.uid for row in rows] if limit else select(self._adapters.c.uid).where(*wanted)
            )
            aliases: dict[str, dict[str, int]] = {}
            for each in connection.execute(select(self._aliases).where(some).order_by(columns.alias)):
                aliases.setdefault(each.adapter, {})[each.alias] = each.number
            return [_adapter(row, aliases.get(row.uid, {})) for row in rows]

    def _select_versions(self, *wanted: ColumnElement[bool], limit: int | None = None) -> list[AdapterVersion]:
        """Versions, newest first."""
        joined = self._versions.join(self._adapters, self._versions.c.adapter == self._adapters.c.uid)
        query = select(self._versions, self._adapters.c.id).select_from(joined).where(*wanted)
        aliases = self._aliases.c
        with self._database.read() as connection:
            versions = []
            for row in connection.execute(query.order_by(self._versions.c.number.desc()).limit(limit)):
                pointing = select(aliases.alias).where(aliases.adapter == row.adapter, aliases.number == row.number)
                versions.append(_version(row, tuple(connection.scalars(pointing.order_by(aliases.alias)))))
            return versions

    def _select_moves(self, *wanted: ColumnElement[bool], order: Any, limit: int | None = None) -> list[AliasMove]:  # noqa: ANN401  # a column
        with self._database.read() as connection:
            rows = connection.execute(select(self._moves).where(*wanted).order_by(order).limit(limit))
            return [
                AliasMove(**{name: value for name, value in row._asdict().items() if name != "adapter"}) for row in rows
            ]


def _settings(settings: Settings) -> dict[str, Any]:
    return {
        "display_name": settings.display_name,
        "labels": _json(dict(settings.labels)),
        "traffic_split": _json(settings.traffic_split) if settings.traffic_split else "",
        "preload": settings.preload,
    }


def _adapter(row: Row[Any], aliases: Mapping[str, int]) -> Adapter:
    return Adapter(
        row.tenant, AdapterName(row.id), row.uid, row.display_name, _read(row.labels, dict[str, str]),
        ModelName(row.model.removeprefix("models/")), aliases,
        _read(row.traffic_split, TrafficSplit) if row.traffic_split else None,
        bool(row.preload), row.latest_version, row.revision, row.created_s, row.updated_s,
    )  # fmt: skip


def _version(row: Row[Any], aliases: tuple[str, ...]) -> AdapterVersion:
    return AdapterVersion(
        row.uid, AdapterVersionName(row.id, row.number), _read(row.content, Inspected), _read(row.lineage, Lineage),
        _read(row.progress, Progress) if row.progress else None, aliases, row.created_s,
    )  # fmt: skip


def _served(adapter: Adapter, digests: Mapping[str, str]) -> ServedAdapter:
    aliases = [
        ServedAlias(alias, AdapterVersionName(adapter.name.adapter, number), digests[alias])
        for alias, number in sorted(adapter.aliases.items())
    ]
    return ServedAdapter(adapter.tenant, adapter.name, tuple(aliases), adapter.traffic_split, adapter.preload)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _read(text: str, kind: type[_T]) -> _T:
    return msgspec.json.decode(text, type=kind)
