"""From row files to canonical rows: the first pass, which reads every line once and looks at no picture."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from veneer_dataset.domain.answers import answer_warnings
from veneer_dataset.domain.dialects import Dialect, dialect_of, read_draft, unread_fields
from veneer_dataset.domain.draft import Draft
from veneer_dataset.domain.finding_log import FindingLog
from veneer_dataset.domain.findings import Finding, Refusal, shown
from veneer_dataset.domain.json_row import parse_row
from veneer_dataset.domain.lines import row_lines
from veneer_dataset.domain.picture_paths import PictureManifest
from veneer_dataset.domain.pictures import PictureTable
from veneer_dataset.domain.report import RowFileReport
from veneer_dataset.domain.spool import Spool
from veneer_digests import NotCanonicalError, canonical_row
from veneer_rpc.errors import ResourceExhausted

MAX_ROWS = 10_000_000
MAX_ROW_BYTES = 2 * 1024 * 1024
_ROWS_A_REPORT = 500


class RowRecord(msgspec.Struct, array_like=True):
    """A canonical row with its origin; `pictures` holds (index in the table, place in the row as sent)."""

    file: int
    line: int
    row: bytes
    digest: bytes
    pictures: list[tuple[int, str]]
    split: str
    group: str


@dataclass(frozen=True, slots=True)
class RowFile:
    """A submitted file of rows."""

    path: str
    digest: str
    split: str = ""


class RowIntake:
    """Reads row files into records.

    Args:
        manifest: what paths mean.
        pictures: takes the pictures that rows name.
        rows: takes the records.
        findings: takes what is wrong or odd.
        inline_folder: takes the files of pictures that rows hold themselves, named by digest.
        default_prompt: of pairs without a prompt.
        progress: told how many rows were read so far.
    """

    def __init__(
        self,
        manifest: PictureManifest,
        pictures: PictureTable,
        rows: Spool[RowRecord],
        findings: FindingLog,
        inline_folder: Path,
        default_prompt: str,
        progress: Callable[[int], None],
    ) -> None:
        self._manifest = manifest
        self._pictures = pictures
        self._rows = rows
        self._findings = findings
        self._inline_folder = inline_folder
        self._default_prompt = default_prompt
        self._progress = progress
        self._path_twice: set[int] = set()
        self.submitted = 0

    def read(self, index: int, path: str, pieces: Iterable[bytes]) -> RowFileReport:
        """Reads one file; accepted rows are counted later, by who accepts them.

        Raises:
            ResourceExhausted: a bound on lines or rows is exceeded.
        """
        report = RowFileReport(path)
        noted: set[str] = set()
        for line, data in row_lines(pieces, path):
            report.submitted_rows += 1
            self.submitted += 1
            if self.submitted % _ROWS_A_REPORT == 0:
                self._progress(self.submitted)
            if self.submitted > MAX_ROWS:
                raise ResourceExhausted("TOO_MANY_ROWS", f"{path}:{line}: more than {MAX_ROWS} rows, the limit")
            try:
                row = parse_row(data)
                dialect = dialect_of(row)
                if dialect is not report.dialect:
                    if report.dialect not in (Dialect.NONE, Dialect.MIXED):
                        self._note(
                            index, path, line, "DIALECT_MIXED", "$", f"{dialect.name} after {report.dialect.name}"
                        )
                    report.dialect = dialect if report.dialect is Dialect.NONE else Dialect.MIXED
                for field in unread_fields(row, dialect):
                    if field not in noted and len(noted) < 100:
                        noted.add(field)
                        self._note(index, path, line, "FIELD_UNREAD", f"$.{shown(field)}", row[field])
                self._take(index, path, line, row, dialect)
            except Refusal as refusal:
                self._note(index, path, line, refusal.code, refusal.json_path, refusal.found)
        if not report.submitted_rows:
            self._note(index, path, 0, "FILE_EMPTY", "", "no row")
        return report

    def _take(self, index: int, path: str, line: int, row: dict[str, Any], dialect: Dialect) -> None:
        draft = read_draft(row, dialect, self._default_prompt)
        pictures = self._resolve(index, path, line, draft) if draft.pictures else []
        try:
            canonical = canonical_row({"messages": draft.messages})
        except NotCanonicalError as error:  # nothing a reader lets through; a surrogate in a default prompt would be
            raise Refusal("JSON_INVALID", "$", error) from error
        if len(canonical) > MAX_ROW_BYTES:
            raise Refusal("ROW_TOO_LARGE", "$", f"{len(canonical)} bytes")
        is_pair = dialect is Dialect.PAIR
        for message in draft.messages:
            if message["role"] == "assistant" and "weight" not in message:
                for code, found in answer_warnings(message["content"][0]["text"], is_pair=is_pair):
                    self._note(index, path, line, code, "$", found)
        self._rows.append(
            RowRecord(index, line, canonical, sha256(canonical).digest(), pictures, draft.split, draft.group)
        )

    def _resolve(self, index: int, path: str, line: int, draft: Draft) -> list[tuple[int, str]]:
        """Fills in the digests of a draft's pictures; all that cannot be found are noted before one is raised."""
        resolved: list[tuple[int, str]] = []
        refusals: list[Refusal] = []
        for use in draft.pictures:
            entry = -1
            if isinstance(use.source, bytes):
                digest = self._keep_inline(use.source)
            else:
                try:
                    match = self._manifest.resolve(use.source, use.json_path)
                except Refusal as refusal:
                    refusals.append(refusal)
                    continue
                if match.code:
                    self._note(index, path, line, match.code, use.json_path, match.found)
                entry, digest = match.entry, self._manifest.digest(match.entry)
            use.part["digest"] = digest.hex()
            picture = self._pictures.index(digest, entry)
            first = self._pictures.first_entry(picture)
            if entry not in (-1, first) and entry not in self._path_twice:
                self._path_twice.add(entry)
                twin = self._manifest.path(first) if first >= 0 else "a picture inside a row"
                self._note(index, path, line, "PICTURE_TWICE", use.json_path, f"the same file as {twin}")
            resolved.append((picture, use.json_path))
        for each in refusals[:-1]:
            self._note(index, path, line, each.code, each.json_path, each.found)
        if refusals:
            raise refusals[-1]
        return resolved

    def _keep_inline(self, data: bytes) -> bytes:
        digest = sha256(data)
        file = self._inline_folder / digest.hexdigest()
        if not file.exists():
            file.write_bytes(data)
        return digest.digest()

    def _note(self, index: int, path: str, line: int, code: str, json_path: str, found: object) -> None:
        self._findings.add(index, Finding(code, path, line, json_path, shown(found)))
