"""Versions as they are kept, and the holds that keep them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from veneer_dataset.domain.report import Report, SplitSummary
from veneer_rpc.errors import violations

MAX_HOLDER_CHARS = 128
MAX_HOLD = timedelta(days=30)
DEFAULT_HOLD = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class DatasetVersion:
    """See the contract's DatasetVersion."""

    dataset_id: str
    digest: str
    canonicaliser_version: int
    splits: tuple[SplitSummary, ...]
    report: Report
    labels: Mapping[str, str]
    picture_size_bytes: int
    picture_count: int
    hold_count: int
    created: datetime


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A version and its key in the store; keys grow from version to version."""

    key: int
    version: DatasetVersion

    def split_bounds(self, split: str) -> tuple[int, int] | None:
        """First position and number of a split's rows, which are stored by split; None where there is none."""
        start = 0
        for each in self.version.splits:
            if each.split == split:
                return start, each.row_count
            start += each.row_count
        return None


@dataclass(frozen=True, slots=True)
class Hold:
    """Who keeps a version, and until when."""

    holder: str
    expires: datetime


def new_hold(holder: str, expires: datetime | None, now: datetime) -> Hold:
    """A hold from now on.

    Raises:
        InvalidArgument: with every wrong field.
    """
    with violations() as found:
        if not 0 < len(holder) <= MAX_HOLDER_CHARS:
            found.add("holder", "OUT_OF_RANGE", f"must be 1 to {MAX_HOLDER_CHARS} characters, was {len(holder)}")
        if expires is not None and not now < expires <= now + MAX_HOLD:
            found.add(
                "expire_time", "OUT_OF_RANGE", f"must be within {MAX_HOLD.days} days from now, was {expires:%FT%TZ}"
            )
    return Hold(holder, expires or now + DEFAULT_HOLD)
