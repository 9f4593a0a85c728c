"""Names of resources: what they look like, and nothing of what they stand for.

Identifiers follow AIP-122 (https://google.aip.dev/122): 1 to 63 lower-case letters, digits and hyphens, the
first a letter, the last a letter or a digit. A dataset's version is its SHA-256; an adapter's is a number
that counts from 1.
"""

import re
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Self, TypeVar

from veneer_rpc.errors import Violation, invalid

_ID = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNT = re.compile(r"[1-9][0-9]{0,17}")  # below 2⁶³

_ID_RULE = "1-63 of a-z, 0-9 and '-', starting with a letter and not ending with '-'"
_SHA256_RULE = "64 lower-case hex digits"
_COUNT_RULE = "a whole number from 1, without leading zeros"


def is_id(text: str) -> bool:
    """Says whether a text can be the last part of a resource's name."""
    return _ID.fullmatch(text) is not None


@dataclass(frozen=True)
class ResourceName:
    """A name whose parts fit its pattern; making one from parts checks them, like reading one from a text."""

    type: ClassVar[str]
    pattern: ClassVar[str]
    rules: ClassVar[dict[str, tuple[re.Pattern[str], str]]] = {}
    numbers: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for part in fields(self):
            rule, text = self._rule(part.name)
            if not rule.fullmatch(str(getattr(self, part.name))):
                raise ValueError(f"{{{part.name}}} of {self.pattern} must be {text}")

    def __str__(self) -> str:
        return self.pattern.format_map(vars(self))

    @classmethod
    def parse(cls, text: str, field: str = "name") -> Self:
        """Reads a name.

        Args:
            text: what the caller sent.
            field: the path of the field it came in, for the error.

        Raises:
            InvalidArgument: with the field, the expected pattern and the actual value.
        """
        name = cls._read(text)
        if name is None:
            raise invalid(Violation(field, "INVALID_RESOURCE_NAME", f"must be {cls._expected()}, was {_show(text)}"))
        return name

    @classmethod
    def _read(cls, text: str) -> Self | None:
        match = cls._shape().fullmatch(text)
        if match is None:
            return None
        parts: dict[str, Any] = match.groupdict()
        if not all(cls._rule(part)[0].fullmatch(value) for part, value in parts.items()):
            return None
        return cls(**{part: int(value) if part in cls.numbers else value for part, value in parts.items()})

    @classmethod
    @cache
    def _shape(cls) -> re.Pattern[str]:
        return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/@]*)", re.escape(cls.pattern)))

    @classmethod
    def _rule(cls, part: str) -> tuple[re.Pattern[str], str]:
        return cls.rules.get(part, (_ID, _ID_RULE))

    @classmethod
    def _expected(cls) -> str:
        return f"{cls.pattern} with " + ", ".join(f"{{{f.name}}} {cls._rule(f.name)[1]}" for f in fields(cls))


@dataclass(frozen=True)
class DatasetName(ResourceName):
    """`datasets/{dataset}`."""

    type = "veneer/Dataset"
    pattern = "datasets/{dataset}"
    dataset: str


@dataclass(frozen=True)
class DatasetVersionName(ResourceName):
    """`datasets/{dataset}/versions/{version}`; the version is the SHA-256 of its contents."""

    type = "veneer/DatasetVersion"
    pattern = "datasets/{dataset}/versions/{version}"
    rules = {"version": (_SHA256, _SHA256_RULE)}  # noqa: RUF012  # ClassVar, declared in the base
    dataset: str
    version: str


@dataclass(frozen=True)
class ModelName(ResourceName):
    """`models/{model}`."""

    type = "veneer/Model"
    pattern = "models/{model}"
    model: str


@dataclass(frozen=True)
class TrainingJobName(ResourceName):
    """`trainingJobs/{training_job}`."""

    type = "veneer/TrainingJob"
    pattern = "trainingJobs/{training_job}"
    training_job: str


@dataclass(frozen=True)
class AdapterName(ResourceName):
    """`adapters/{adapter}`."""

    type = "veneer/Adapter"
    pattern = "adapters/{adapter}"
    adapter: str


@dataclass(frozen=True)
class AdapterVersionName(ResourceName):
    """`adapters/{adapter}/versions/{version}`; versions count from 1."""

    type = "veneer/AdapterVersion"
    pattern = "adapters/{adapter}/versions/{version}"
    rules = {"version": (_COUNT, _COUNT_RULE)}  # noqa: RUF012  # ClassVar, declared in the base
    numbers = frozenset({"version"})
    adapter: str
    version: int


@dataclass(frozen=True)
class AdapterAliasName(ResourceName):
    """`adapters/{adapter}@{alias}`: the version an alias points at when a request is admitted."""

    type = "veneer/AdapterAlias"
    pattern = "adapters/{adapter}@{alias}"
    adapter: str
    alias: str


@dataclass(frozen=True)
class EvaluationName(ResourceName):
    """`evaluations/{evaluation}`."""

    type = "veneer/Evaluation"
    pattern = "evaluations/{evaluation}"
    evaluation: str


@dataclass(frozen=True)
class ExportName(ResourceName):
    """`exports/{export}`."""

    type = "veneer/Export"
    pattern = "exports/{export}"
    export: str


ALL: tuple[type[ResourceName], ...] = (
    DatasetName,
    DatasetVersionName,
    ModelName,
    TrainingJobName,
    AdapterName,
    AdapterVersionName,
    AdapterAliasName,
    EvaluationName,
    ExportName,
)

_N = TypeVar("_N", bound=ResourceName)


def parse_one_of(text: str, field: str, *kinds: type[_N]) -> _N:
    """Reads a name that may be of several kinds, such as what a request for an answer may address.

    Raises:
        InvalidArgument: with the field, every accepted pattern and the actual value.
    """
    for kind in kinds:
        name = kind._read(text)
        if name is not None:
            return name
    expected = "; or ".join(kind._expected() for kind in kinds)
    raise invalid(Violation(field, "INVALID_RESOURCE_NAME", f"must be {expected}, was {_show(text)}"))


def type_of(name: str) -> str:
    """Returns the resource type of a name (`veneer/Dataset`), or an empty text for a name of no kind."""
    return next((kind.type for kind in ALL if kind._read(name) is not None), "")


def _show(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}… ({len(text)} characters)"
