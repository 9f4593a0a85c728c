"""Adapters as releases: immutable versions, aliases that move, and the rules by which they do."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from veneer_rpc.errors import Aborted, FailedPrecondition, NotFound, Violation, Violations, invalid
from veneer_rpc.names import AdapterName, AdapterVersionName, ModelName
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.jobs import Contract, Progress, Resolved
from veneer_trainer.domain.spec import Lora, TrainingSpec

PRODUCTION = "production"
"""The alias that answers requests which name the adapter alone; an adapter's first version takes it."""

ALIAS = re.compile(r"[a-z][a-z0-9-]{0,31}")
MAX_ALIASES = 64
MAX_REASON = 512
_MAX_LABELS = 64
_MAX_DISPLAY_NAME = 200
_LABEL_KEY = re.compile(r"[a-z0-9_-]{1,63}")
_MAX_LABEL_VALUE = 63
_MAX_MIN_ANSWERS = 1_000_000


@dataclass(frozen=True, slots=True)
class RollbackPolicy:
    """Bounds of a canary; None is not judged."""

    min_answers: int = 50
    max_error_rate: float | None = None
    max_latency_ratio: float | None = None
    min_judgement: float | None = None


@dataclass(frozen=True, slots=True)
class TrafficSplit:
    """A second alias, and its share (0-1) of the requests that name the adapter alone."""

    alias: str
    share: float
    rollback: RollbackPolicy | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A named line of versions on one base, as the registry has it. Times are seconds since 1970.

    Attributes:
        uid: never reused, unlike the name.
        aliases: version number by alias.
        latest_version: the greatest number ever given; 0 before the first.
        revision: the registry's revision of its last change.
    """

    tenant: str
    name: AdapterName
    uid: str
    display_name: str
    labels: Mapping[str, str]
    model: ModelName
    aliases: Mapping[str, int]
    traffic_split: TrafficSplit | None
    preload: bool
    latest_version: int
    revision: int
    created_s: float
    updated_s: float

    @property
    def etag(self) -> str:
        """Changes with every change."""
        return f"r{self.revision}"

    def check_etag(self, etag: str) -> None:
        """Lets a change pass whose author has seen the adapter as it is; an empty one passes always.

        Raises:
            Aborted: ETAG_STALE.
        """
        if etag and etag != self.etag:
            raise Aborted(
                "ETAG_STALE",
                f"{self.name} changed meanwhile: etag is {self.etag}, not {etag[:80]}",
                resource=str(self.name),
            )


@dataclass(frozen=True, slots=True)
class Imported:
    """What an importer said of an adapter that was made elsewhere."""

    description: str
    importer: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version comes from: a job, with its spec and what was resolved for it, or an import."""

    training_job: str = ""
    imported: Imported | None = None
    spec: TrainingSpec | None = None
    resolved: Resolved | None = None
    code_version: str = ""
    initial_adapter_version: str = ""


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a PEFT folder turned out to hold; `target_modules` are whole names, sorted."""

    digest: str
    contract: Contract
    lora: Lora
    target_modules: tuple[str, ...]
    size_bytes: int
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version to register: its uid names its folder; `job_uid` is empty for an import."""

    uid: str
    content: Inspected
    lineage: Lineage
    final_progress: Progress | None = None
    job_uid: str = ""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """A registered version; immutable but for the aliases that point at it."""

    uid: str
    name: AdapterVersionName
    content: Inspected
    lineage: Lineage
    final_progress: Progress | None
    aliases: tuple[str, ...]
    created_s: float

    @property
    def digest(self) -> str:
        """What is sealed: tensors, configuration and contract."""
        return self.content.digest


@dataclass(frozen=True, slots=True)
class AliasMove:
    """An alias that moved; 0 stands for no version. `back` is True for a rollback."""

    sequence: int
    alias: str
    from_version: int
    to_version: int
    actor: str
    reason: str
    moved_s: float
    back: bool = False


@dataclass(frozen=True, slots=True)
class ServedAlias:
    """An alias with the version and digest that it stands for."""

    alias: str
    version: AdapterVersionName
    digest: str


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """What replicas should know of one adapter."""

    tenant: str
    name: AdapterName
    aliases: tuple[ServedAlias, ...]
    traffic_split: TrafficSplit | None
    preload: bool


@dataclass(frozen=True, slots=True)
class RegistryChanges:
    """What is new since a revision: adapters as they are now, and (tenant, name) of those that are gone."""

    revision: int
    adapters: tuple[ServedAdapter, ...] = ()
    deleted: tuple[tuple[str, AdapterName], ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """What an owner may set on an adapter."""

    display_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    traffic_split: TrafficSplit | None = None
    preload: bool = False


def settings_of(adapter: Adapter) -> Settings:
    """Returns what its owner has set."""
    return Settings(adapter.display_name, adapter.labels, adapter.traffic_split, adapter.preload)


def check_settings(settings: Settings, aliases: Collection[str], found: Violations) -> None:
    """Notes what is wrong with an owner's settings."""
    if len(settings.display_name) > _MAX_DISPLAY_NAME:
        text = f"at most {_MAX_DISPLAY_NAME} characters, were {len(settings.display_name)}"
        found.add("adapter.display_name", "TOO_LONG", text)
    if len(settings.labels) > _MAX_LABELS:
        found.add("adapter.labels", "TOO_MANY", f"at most {_MAX_LABELS} labels, were {len(settings.labels)}")
    for key, value in settings.labels.items():
        if not _LABEL_KEY.fullmatch(key) or len(value) > _MAX_LABEL_VALUE:
            text = f"keys are 1-63 of a-z, 0-9, '-' and '_', values at most {_MAX_LABEL_VALUE} characters"
            found.add(f"adapter.labels[{key[:63]!r}]", "INVALID_LABEL", text)
    if (split := settings.traffic_split) is not None:
        _check_split(split, aliases, found)


def _check_split(split: TrafficSplit, aliases: Collection[str], found: Violations) -> None:
    place = "adapter.traffic_split"
    if split.alias not in aliases or split.alias == PRODUCTION:
        text = f"must be an alias of the adapter beside {PRODUCTION}, was {split.alias[:80]!r}"
        found.add(f"{place}.alias", "ALIAS_UNKNOWN", text)
    bounds: list[tuple[str, float | None, float, float]] = [("share", split.share, 0, 1)]
    if (policy := split.rollback) is not None:
        bounds += [
            ("rollback.min_answers", policy.min_answers, 1, _MAX_MIN_ANSWERS),
            ("rollback.max_error_rate", policy.max_error_rate, 0, 1),
            ("rollback.max_latency_ratio", policy.max_latency_ratio, 1, float("inf")),
            ("rollback.min_judgement", policy.min_judgement, 0, 1),
        ]
    for name, value, low, high in bounds:
        if value is not None and not low <= value <= high:
            found.add(f"{place}.{name}", "OUT_OF_RANGE", f"must be {low:g} to {high:g}, was {value:g}")


def checked_alias(alias: str, field: str = "alias") -> str:
    """Returns an alias, the default for an empty one.

    Raises:
        InvalidArgument: it is malformed.
    """
    if alias and not ALIAS.fullmatch(alias):
        text = f"must be 1-32 of a-z, 0-9 and '-', starting with a letter, was {alias[:80]!r}"
        raise invalid(Violation(field, "INVALID_ALIAS", text))
    return alias or PRODUCTION


def checked_reason(reason: str) -> str:
    """Returns the words of who moves an alias; raises InvalidArgument when they are too many."""
    if len(reason) > MAX_REASON:
        raise invalid(Violation("reason", "TOO_LONG", f"at most {MAX_REASON} characters, were {len(reason)}"))
    return reason


def version_before(moves: Iterable[AliasMove], versions: Collection[int]) -> int:
    """Returns the version that an alias goes back to; 0 when there is none.

    Args:
        moves: those of the alias, oldest first. A rollback takes the newest promotion back, so that two in a row
            go back two versions; what an alias pointed at before it was removed is forgotten.
        versions: numbers that still exist; others are passed over.
    """
    stack: list[int] = []
    for move in moves:
        if move.to_version == 0:
            stack.clear()
        elif move.back:
            while stack and stack[-1] != move.to_version:
                stack.pop()
        elif not stack or stack[-1] != move.to_version:
            stack.append(move.to_version)
    return next((number for number in reversed(stack[:-1]) if number in versions and number != stack[-1]), 0)


def version_unknown(name: AdapterVersionName) -> NotFound:
    """Returns the answer to a name that stands for nothing, or for nothing of the caller's."""
    return NotFound("VERSION_UNKNOWN", f"there is no {name}", resource=str(name))


def check_deletable(version: AdapterVersion, users: Collection[str]) -> None:
    """Lets a version be deleted that nothing names.

    Args:
        version: the version.
        users: unfinished work that names it.

    Raises:
        FailedPrecondition: VERSION_IN_USE, with what names it.
    """
    if version.aliases or users:
        names = [f"alias {alias}" for alias in version.aliases] + sorted(users)
        raise FailedPrecondition(
            "VERSION_IN_USE", f"{version.name} is named by {', '.join(names[:10])}", resource=str(version.name)
        )
