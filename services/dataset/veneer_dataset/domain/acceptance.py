"""Which of the canonical rows are accepted: the second pass, when pictures are known and tokens are counted."""

import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from veneer_dataset.domain.answers import AnswerCensus, last_answer
from veneer_dataset.domain.finding_log import FindingLog
from veneer_dataset.domain.findings import Finding, shown
from veneer_dataset.domain.intake import RowRecord
from veneer_dataset.domain.pictures import PictureTable, is_too_thin, shape_warning
from veneer_dataset.domain.report import RowFileReport
from veneer_dataset.domain.splits import Fractions, given_split, group_of, split_of_group, stratified_splits
from veneer_dataset.domain.spool import Spool
from veneer_dataset.domain.tokens import Counting, TokenColumns, Uncountable, count_rows, length_finding

ROWS_AT_ONCE = 512

_decode = msgspec.json.Decoder().decode


class AcceptedRows:
    """The rows of a version, by columns: place in the spool, digest, split, and tokens where counted."""

    def __init__(self) -> None:
        self.places = array("Q")
        self.digests = bytearray()
        self.split_ids = array("H")
        self.splits: dict[str, int] = {}
        self.tokens = TokenColumns()

    def __len__(self) -> int:
        return len(self.places)

    def add(self, place: int, digest: bytes, split: str) -> None:
        """Adds a row."""
        self.places.append(place)
        self.digests += digest
        self.split_ids.append(self.splits.setdefault(split, len(self.splits)))

    def stored_order(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Rows by split's name, then by digest; equal ones as they came."""
        names = sorted(self.splits)
        rank_by_id = np.array([names.index(split) for split in self.splits], np.int64)
        ranks = rank_by_id[np.frombuffer(self.split_ids, np.uint16)] if self.places else np.empty(0, np.int64)
        words = np.frombuffer(self.digests, ">u8").reshape(-1, 4)
        return np.lexsort((words[:, 3], words[:, 2], words[:, 1], words[:, 0], ranks))


class Acceptance:
    """Accepts or refuses each row of a spool, and says what is odd about those it accepts."""

    def __init__(
        self,
        rows: Spool[RowRecord],
        pictures: PictureTable,
        findings: FindingLog,
        files: Sequence[RowFileReport],
        counting: Counting | None,
    ) -> None:
        self._rows = rows
        self._pictures = pictures
        self._findings = findings
        self._files = files
        self._counting = counting

    def run(
        self, file_splits: Sequence[str], fractions: Fractions | None, progress: Callable[[int], None]
    ) -> AcceptedRows:
        """Goes through all rows.

        Args:
            file_splits: the split of each file, as its submitter gave it; may be empty.
            fractions: how splits follow from content; None: as they were given.
            progress: told how many rows are done.
        """
        accepted, census = AcceptedRows(), AnswerCensus()
        groups: dict[str, str] = {}
        row_groups: list[str] = []
        for batch in self._batches():
            for place, record, row in self._counted(batch, accepted):
                group = self._group(record, fractions)
                if fractions is None:
                    split = given_split(record.split, file_splits[record.file], self._files[record.file].path)
                elif fractions.stratified:
                    groups.setdefault(group, last_answer(row)[:200])
                    row_groups.append(group)
                    split = ""
                else:
                    split = split_of_group(fractions, group)
                accepted.add(place, record.digest, split)
                census.add(last_answer(row))
                self._files[record.file].accepted_rows += 1
            progress(len(accepted))
        if fractions and fractions.stratified and row_groups:
            split_by_group = stratified_splits(fractions, groups)
            accepted.splits = {split: index for index, split in enumerate(sorted(fractions.shares))}
            accepted.split_ids = array("H", [accepted.splits[split_by_group[group]] for group in row_groups])
            accepted.splits = {s: i for s, i in accepted.splits.items() if i in set(accepted.split_ids)}
            self._whole("SPLIT_STRATIFIED", f"{len(groups)} groups, {len(set(groups.values()))} answers")
        for code, found in census.warnings():
            self._whole(code, found)
        return accepted

    def warn(self, accepted: AcceptedRows, paths_of: Callable[[set[int]], Mapping[int, str]]) -> None:
        """Notes what only the whole shows: rows twice, pictures twice, nearly twice or in two splits.

        Args:
            accepted: what `run` returned.
            paths_of: the paths of some of the manifest's entries.
        """
        near = self._pictures.near_duplicates()
        paths = paths_of({self._pictures.first_entry(int(each)) for each in np.unique(near[near >= 0])})
        splits = list(accepted.splits)
        twice = self._repeated(accepted)
        split_by_picture = array("l", [-1]) * len(self._pictures)
        with self._rows.reader() as reader:
            for index, place in enumerate(accepted.places):
                record, split_id = reader.at(place), accepted.split_ids[index]
                if index in twice:
                    self._note(record, "ROW_TWICE", "$", f"the row of {twice[index]}")
                for picture, json_path in record.pictures:
                    first_split = split_by_picture[picture]
                    if first_split == -1:
                        split_by_picture[picture] = split_id
                        if warning := shape_warning(self._pictures.facts(picture)):
                            self._note(record, warning[0], json_path, warning[1])
                        if (alike := int(near[picture])) >= 0:
                            other = paths.get(self._pictures.first_entry(alike))
                            other = other or f"the picture {self._pictures.digest(alike)[:12]} inside a row"
                            self._note(record, "PICTURE_NEARLY_TWICE", json_path, f"looks like {other}")
                    elif first_split not in (-2, split_id):
                        split_by_picture[picture] = -2  # told once
                        found = f"in {splits[first_split]} and in {splits[split_id]}"
                        self._note(record, "PICTURE_IN_TWO_SPLITS", json_path, found)

    def _batches(self) -> Iterator[list[tuple[int, RowRecord, dict[str, Any]]]]:
        """Places, records and rows whose pictures are all fine, some at a time."""
        batch: list[tuple[int, RowRecord, dict[str, Any]]] = []
        for place, record in self._rows.items():
            if self._pictures_fine(record):
                batch.append((place, record, _decode(record.row)))
            if len(batch) == ROWS_AT_ONCE:
                yield batch
                batch = []
        yield batch

    def _pictures_fine(self, record: RowRecord) -> bool:
        fine = True
        for picture, json_path in record.pictures:
            facts = self._pictures.facts(picture)
            if facts.code:
                self._note(record, facts.code, json_path, facts.found)
                fine = False
            elif is_too_thin(facts):
                self._note(record, "PICTURE_TOO_THIN", json_path, f"{facts.width}x{facts.height}")
                fine = False
        return fine

    def _counted(
        self, batch: list[tuple[int, RowRecord, dict[str, Any]]], accepted: AcceptedRows
    ) -> Iterator[tuple[int, RowRecord, dict[str, Any]]]:
        """Those of a batch that the model can be given, their tokens noted."""
        if self._counting is None:
            yield from batch
            return
        counts = count_rows(self._counting, [row for _, _, row in batch], self._pictures.size)
        for (place, record, row), count in zip(batch, counts, strict=True):
            if isinstance(count, Uncountable):
                self._note(record, count.code, "$", count.found)
                continue
            if finding := length_finding(self._counting, count.total):
                self._note(record, finding[0], "$", finding[1])
                if finding[0] == "ROW_OVER_CONTEXT":
                    continue
            accepted.tokens.add(count)
            yield place, record, row

    def _group(self, record: RowRecord, fractions: Fractions | None) -> str:
        if fractions is None:
            return ""
        picture = self._pictures.digest(record.pictures[0][0]) if record.pictures else ""
        return group_of(fractions.group_key, record.digest.hex(), picture, record.group)

    def _repeated(self, accepted: AcceptedRows) -> dict[int, str]:
        """For each row that an earlier one of its split equals: where the earlier one stands."""
        twice: dict[int, str] = {}
        order = accepted.stored_order()
        with self._rows.reader() as reader:
            for before, row in itertools.pairwise(order):
                if (
                    accepted.digests[32 * before : 32 * before + 32] == accepted.digests[32 * row : 32 * row + 32]
                    and accepted.split_ids[before] == accepted.split_ids[row]
                ):
                    record = reader.at(accepted.places[before])
                    twice[int(row)] = f"{self._files[record.file].path}:{record.line}"
        return twice

    def _note(self, record: RowRecord, code: str, json_path: str, found: str) -> None:
        path = self._files[record.file].path
        self._findings.add(record.file, Finding(code, path, record.line, json_path, shown(found)))

    def _whole(self, code: str, found: str) -> None:
        self._findings.add(0, Finding(code, self._files[0].path, 0, "", shown(found)))
