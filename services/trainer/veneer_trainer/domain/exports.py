"""An export: queued work whose order is a version and a form, and the folder that came of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

import msgspec

from veneer_rpc.errors import violations
from veneer_rpc.names import AdapterVersionName, ExportName
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.work import Work


class ExportFormat(Enum):
    """The form of an exported model."""

    MERGED = "merged"
    ONNX = "onnx"
    OPENVINO = "openvino"


DTYPES = {
    ExportFormat.MERGED: ("float32", "bfloat16"),
    ExportFormat.ONNX: ("float32", "int8"),
    ExportFormat.OPENVINO: ("float32", "int8"),
}
"""What weights may be, by form; the first is the default."""

CHECKED_SPLITS = ("test", "validation", "train")
"""Splits that an export is checked on, where none is named: the first that there is."""

_SPLIT = re.compile(r"[a-z0-9_-]{1,32}")


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """What to export; an empty split is chosen when the export is accepted."""

    adapter_version: AdapterVersionName
    format: ExportFormat
    dtype: str = ""
    check_split: str = ""
    force: bool = False

    def check(self) -> None:
        """Checks every bound of the contract; raises InvalidArgument with every violation."""
        with violations() as found:
            allowed = DTYPES[self.format]
            if self.dtype not in ("", *allowed):
                text = f"must be {' or '.join(allowed)} for {self.format.value}, was {self.dtype}"
                found.add("spec.dtype", "DTYPE_UNSUPPORTED", text)
            if self.check_split and not _SPLIT.fullmatch(self.check_split):
                text = f"must be 1-32 of a-z, 0-9, '-' and '_', was {self.check_split[:80]!r}"
                found.add("spec.check_split", "INVALID_SPLIT", text)


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """What was asked for, pinned. Never changes; an empty `dataset_version` leaves drawn pictures to check on."""

    spec: ExportSpec
    model: str
    adapter_digest: str
    dataset_version: str = ""


@dataclass(frozen=True, slots=True)
class ExportOutcome:
    """What came of an export: its files with the certificate among them, and the envelope again."""

    digest: str = ""
    files: tuple[StoredFile, ...] = ()
    certificate: str = ""


@dataclass(frozen=True, slots=True)
class Export:
    """An export's typed parts, and the work that carries them."""

    work: Work
    order: ExportOrder
    outcome: ExportOutcome
    share_done: float

    @property
    def name(self) -> ExportName:
        """The resource's name."""
        return ExportName(self.work.ref.id)

    @property
    def spec(self) -> ExportSpec:
        """What is exported."""
        return self.order.spec


def export_of(work: Work) -> Export:
    """Returns the export that a piece of work is."""
    progress = msgspec.json.decode(work.progress, type=dict[str, float]) if work.progress else {}
    return Export(
        work,
        msgspec.json.decode(work.order, type=ExportOrder),
        msgspec.json.decode(work.outcome, type=ExportOutcome) if work.outcome else ExportOutcome(),
        progress.get("share_done", 0.0),
    )


def as_json(part: ExportOrder | ExportOutcome) -> str:
    """Returns the JSON that `export_of` reads."""
    return msgspec.json.encode(part).decode()
