"""Datasets: what they are called, and what may be said about them."""

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from veneer_dataset.domain.draft import text_of
from veneer_dataset.domain.findings import Refusal
from veneer_rpc.errors import Violations, violations

MAX_DISPLAY_NAME_CHARS = 200
MAX_PROMPT_BYTES = 16 * 1024
MAX_LABELS = 64

_LABEL_KEY = re.compile(r"[a-z0-9_-]{1,63}")
_MAX_LABEL_CHARS = 63


@dataclass(frozen=True, slots=True)
class Dataset:
    """A named line of versions; `latest_version` is a digest or empty."""

    dataset_id: str
    uid: str
    display_name: str
    default_prompt: str
    labels: Mapping[str, str]
    created: datetime
    updated: datetime
    latest_version: str = ""
    version_count: int = 0
    revision: int = 1

    @property
    def etag(self) -> str:
        """Changes whenever the dataset or its list of versions does."""
        return f"{self.uid[:8]}-{self.revision}"


def now() -> datetime:
    """This moment, with its time zone."""
    return datetime.now(UTC)


def new_dataset(
    dataset_id: str, display_name: str = "", default_prompt: str = "", labels: Mapping[str, str] | None = None
) -> Dataset:
    """A dataset that nobody has yet.

    Raises:
        InvalidArgument: with every wrong field.
    """
    moment, uid = now(), str(uuid.uuid4())
    new = Dataset(dataset_id, uid, display_name or dataset_id, default_prompt, dict(labels or {}), moment, moment)
    _check(new)
    return new


def changed(dataset: Dataset, changes: Mapping[str, object]) -> Dataset:
    """A dataset with new values of display_name, default_prompt or labels.

    Raises:
        InvalidArgument: with every wrong field.
    """
    new = replace(dataset, **changes)  # type: ignore[arg-type]  # the edge has read them from their fields
    if not new.display_name:
        new = replace(new, display_name=new.dataset_id)
    _check(new)
    return new


def check_labels(labels: Mapping[str, str], found: Violations, field: str) -> None:
    """Notes what is wrong with labels."""
    if len(labels) > MAX_LABELS:
        found.add(field, "TOO_MANY", f"at most {MAX_LABELS} labels, there are {len(labels)}")
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            found.add(field, "LABEL_KEY", f"a key is 1-63 of a-z, 0-9, '-' and '_', was {key[:80]!r}")
        if len(value) > _MAX_LABEL_CHARS:
            found.add(
                f"{field}[{key[:80]}]",
                "TOO_LONG",
                f"a value has at most {_MAX_LABEL_CHARS} characters, {len(value)} here",
            )


def _check(dataset: Dataset) -> None:
    with violations() as found:
        if len(dataset.display_name) > MAX_DISPLAY_NAME_CHARS:
            found.add(
                "dataset.display_name",
                "TOO_LONG",
                f"at most {MAX_DISPLAY_NAME_CHARS} characters, {len(dataset.display_name)} here",
            )
        size_bytes = len(dataset.default_prompt.encode())
        if size_bytes > MAX_PROMPT_BYTES:
            found.add("dataset.default_prompt", "TOO_LONG", f"at most {MAX_PROMPT_BYTES} bytes, {size_bytes} here")
        try:
            text_of(dataset.default_prompt, "")
        except Refusal as refusal:
            found.add("dataset.default_prompt", refusal.code, f"found {refusal.found}, expected {refusal.expected}")
        check_labels(dataset.labels, found, "dataset.labels")
