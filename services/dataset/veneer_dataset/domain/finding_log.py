"""All findings of a version in the making: written as they come, read in the order of files and lines."""

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import IO

import msgspec
import numpy as np

from veneer_dataset.domain.findings import KINDS, Finding, Severity
from veneer_dataset.domain.report import FindingCount
from veneer_dataset.domain.spool import Spool

_LINE_BITS = 40


class _Record(msgspec.Struct, array_like=True):
    code: str
    path: str
    line: int
    json_path: str
    found: str


class FindingLog:
    """Takes findings in any order.

    Args:
        file: an empty file, open for reading and writing; the caller closes it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._spool = Spool(file, _Record)
        self._places = array("Q")
        self._keys = array("Q")
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, file_index: int, finding: Finding) -> None:
        """Notes a finding; `file_index` is the place of its file among the submitted ones."""
        self._keys.append(file_index << _LINE_BITS | finding.line)
        self._counts[finding.code] += 1
        self._places.append(
            self._spool.append(_Record(finding.code, finding.path, finding.line, finding.json_path, finding.found))
        )

    def __iter__(self) -> Iterator[Finding]:
        order = np.argsort(np.frombuffer(self._keys, np.uint64), kind="stable") if self._keys else ()
        with self._spool.reader() as reader:
            for index in order:
                record = reader.at(self._places[index])
                yield Finding(record.code, record.path, record.line, record.json_path, record.found)

    def counts(self) -> list[FindingCount]:
        """How often each code occurred, by severity, then code."""
        counts = [FindingCount(code, KINDS[code].severity, count) for code, count in self._counts.items()]
        return sorted(counts, key=lambda each: (each.severity, each.code))

    @property
    def has_errors(self) -> bool:
        """Whether anything was refused."""
        return any(KINDS[code].severity is Severity.ERROR for code in self._counts)
