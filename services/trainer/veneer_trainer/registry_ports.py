"""What the registry's domain needs of the world: where versions are kept, and what their folders hold."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from veneer_rpc.names import AdapterName, AdapterVersionName, ModelName
from veneer_trainer.domain.adapters import (
    Adapter,
    AdapterVersion,
    AliasMove,
    Inspected,
    NewVersion,
    RegistryChanges,
    Settings,
)
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Contract
from veneer_trainer.domain.serving import ServingFigures
from veneer_trainer.ports import BaseModel


class RegistryStore(Protocol):
    """Adapters, versions, aliases and their history, durable when a method returns.

    Inside `together` everything is durable at once or not at all, and nobody else writes meanwhile: what was read
    there is still so when it is acted on. Each change of an adapter takes the registry's next revision.
    """

    def together(self) -> AbstractContextManager[Any]:
        """Makes several changes one. No call to another machine inside."""

    def create(self, tenant: str, name: AdapterName, model: ModelName, settings: Settings) -> Adapter:
        """Creates an adapter; numbers go on where a deleted one of the name ended.

        Raises:
            AlreadyExists: NAME_TAKEN.
        """

    def find(self, tenant: str, name: AdapterName) -> Adapter | None:
        """Returns an adapter; None when there is none."""

    def get(self, tenant: str, name: AdapterName) -> Adapter:
        """Returns an adapter; raises NotFound."""

    def page(self, tenant: str, after: str, limit: int, model: str = "") -> list[Adapter]:
        """Returns adapters by name, with an id greater than `after`."""

    def change(self, adapter: Adapter, settings: Settings) -> Adapter:
        """Replaces what an owner may set."""

    def delete(self, adapter: Adapter) -> list[str]:
        """Forgets an adapter, its versions and history; returns the versions' uids."""

    def add_version(self, adapter: Adapter, new: NewVersion) -> AdapterVersion:
        """Registers the next version."""

    def version(self, tenant: str, name: AdapterVersionName) -> AdapterVersion:
        """Returns a version; raises NotFound."""

    def version_of_job(self, job_uid: str) -> AdapterVersion | None:
        """Returns the version that a job published."""

    def versions(self, tenant: str, name: AdapterName, before: int | None, limit: int) -> list[AdapterVersion]:
        """Returns versions, newest first, with a number below `before`; raises NotFound."""

    def numbers(self, adapter: Adapter) -> set[int]:
        """Returns the numbers of the versions that exist."""

    def delete_version(self, tenant: str, version: AdapterVersion) -> None:
        """Forgets a version; its number is not given again."""

    def move(self, adapter: Adapter, alias: str, to: int, actor: str, reason: str, back: bool = False) -> Adapter:
        """Points an alias at a version, at none for 0, and records it."""

    def moves(self, adapter: Adapter, before: int | None, limit: int) -> list[AliasMove]:
        """Returns moves, newest first, with a sequence below `before`."""

    def moves_of(self, adapter: Adapter, alias: str) -> list[AliasMove]:
        """Returns all moves of an alias, oldest first."""

    def revision(self) -> int:
        """Returns the registry's revision; 0 before the first change."""

    def changes(self, after: int, tenant: str = "", model: str = "") -> RegistryChanges:
        """Returns what changed after a revision, for one tenant or all, on one base or all."""

    def version_uids(self) -> set[str]:
        """Returns the uid of every version."""


class ServingStore(Protocol):
    """What was counted of an adapter's versions since one of its moves; durable, inside `together` with the rest."""

    def count(self, adapter: Adapter, since: int, version: int, figures: ServingFigures) -> None:
        """Adds figures of a version; those that were counted since another move go."""

    def figures(self, adapter: Adapter, since: int) -> dict[int, ServingFigures]:
        """Returns the figures since a move, by version number."""


class AdapterFolders(Protocol):
    """PEFT folders of versions, by the version's uid: whole or not at all."""

    def inspect(self, folder: Path, base: BaseModel, contract: Contract) -> Inspected:
        """Reads a received PEFT folder and checks it against its base; seals the contract in it where it is not.

        Raises:
            InvalidArgument: a file that does not belong into such a folder.
            FailedPrecondition: ADAPTER_UNFIT, with every objection: settings, keys, shapes, dtypes, numbers that are
                not finite, another contract.
        """

    def take(self, folder: Path, uid: str) -> None:
        """Makes a folder that version's, durably."""

    def read(self, uid: str, files: Collection[StoredFile]) -> OpenFiles:
        """Opens files of a version; raises NotFound when they are gone."""

    def forget(self, uid: str) -> None:
        """Removes a version's folder."""

    def keep_only(self, uids: Collection[str]) -> None:
        """Removes every other folder."""


class OpenFiles(Protocol):
    """Files of a folder that stay readable when the folder is removed."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Returns bytes of a file."""

    def close(self) -> None:
        """Closes them."""


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """What people and the dataset service want to know of a base.

    Attributes:
        linears: names by group.
        files: small files, sorted by path.
        created_s: when it was installed.
    """

    base: BaseModel
    model_class: str
    contract: Contract
    parameter_count: int
    linears: dict[str, tuple[str, ...]]
    files: tuple[StoredFile, ...]
    created_s: float


class ModelShelf(Protocol):
    """The bases with their small files."""

    def all(self) -> list[ModelDetails]:
        """Returns the bases, by name."""

    def details(self, name: ModelName) -> ModelDetails:
        """Returns a base; raises NotFound."""

    def read(self, name: ModelName, path: str, offset: int, size: int) -> bytes:
        """Returns bytes of one of the files; raises NotFound."""
