"""The report: what became of every submitted row, as it is kept with a version."""

from dataclasses import dataclass, field

from veneer_dataset.domain.dialects import Dialect
from veneer_dataset.domain.findings import Severity


@dataclass(slots=True)
class RowFileReport:
    """A row file as it was read."""

    path: str
    dialect: Dialect = Dialect.NONE
    submitted_rows: int = 0
    accepted_rows: int = 0


@dataclass(frozen=True, slots=True)
class FindingCount:
    """How often one code occurred."""

    code: str
    severity: Severity
    count: int


@dataclass(frozen=True, slots=True)
class TokenTotals:
    """Sums over rows, and the longest row, in tokens."""

    visual: int
    prompt: int
    supervised: int
    longest_row: int


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """A split's name and size; no tokens where no model was named."""

    split: str
    row_count: int
    tokens: TokenTotals | None = None


@dataclass(slots=True)
class Report:
    """See the contract's Report; `length_histogram` holds (least length in tokens, rows)."""

    submitted_rows: int = 0
    accepted_rows: int = 0
    refused_rows: int = 0
    row_files: list[RowFileReport] = field(default_factory=list)
    finding_counts: list[FindingCount] = field(default_factory=list)
    model: str = ""
    contract_digest: str = ""
    length_histogram: list[tuple[int, int]] = field(default_factory=list)
    train_tokens_per_epoch: int = 0
