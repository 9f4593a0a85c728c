"""The making of a version: from submitted files to accepted rows in their stored order, and the report.

Owns the order of the passes. Nothing is kept here: whoever keeps a version reads it from `Made`.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from veneer_dataset.domain.acceptance import Acceptance, AcceptedRows
from veneer_dataset.domain.finding_log import FindingLog
from veneer_dataset.domain.findings import Finding
from veneer_dataset.domain.intake import RowFile, RowIntake, RowRecord
from veneer_dataset.domain.picture_paths import PictureManifest, entry_paths
from veneer_dataset.domain.pictures import Digests, PictureTable
from veneer_dataset.domain.progress import Phase, Progress
from veneer_dataset.domain.report import Report, SplitSummary
from veneer_dataset.domain.splits import Fractions
from veneer_dataset.domain.spool import Spool
from veneer_dataset.domain.tokens import Counting
from veneer_dataset.ports import PictureChecker
from veneer_digests import DatasetVersionHasher


@dataclass(frozen=True, slots=True)
class Submission:
    """What a version is made of. `picture_manifest` is a blob's digest, or empty."""

    row_files: tuple[RowFile, ...]
    picture_manifest: str
    fractions: Fractions | None
    default_prompt: str


class Made:
    """A version as it came out: its rows, report and findings; closing it deletes its working files.

    Attributes:
        digest: of the version.
        report: what became of every row.
        splits: sorted by name.
        inline_folder: files of pictures that rows held themselves, named by digest.
    """

    def __init__(self, work_folder: Path) -> None:
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(dir=work_folder)))
        self.inline_folder = folder / "inline"
        self.inline_folder.mkdir()
        self.rows = Spool(self._stack.enter_context((folder / "rows").open("w+b")), RowRecord)
        self.findings = FindingLog(self._stack.enter_context((folder / "findings").open("w+b")))
        self.pictures = PictureTable()
        self.accepted = AcceptedRows()
        self.report = Report()
        self.splits: list[SplitSummary] = []
        self.digest = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stored_rows(self) -> Iterator[tuple[str, bytes, bytes]]:
        """Split, digest and canonical row of each accepted row, in stored order."""
        names = list(self.accepted.splits)
        with self.rows.reader() as reader:
            for index in self.accepted.stored_order():
                record = reader.at(self.accepted.places[index])
                yield names[self.accepted.split_ids[index]], record.digest, record.row

    def used_pictures(self) -> Digests:
        """The pictures that accepted rows name."""
        used = np.zeros(len(self.pictures), np.bool_)
        with self.rows.reader() as reader:
            for place in self.accepted.places:
                for picture, _ in reader.at(place).pictures:
                    used[picture] = True
        return self.pictures.chosen(used)


def make_version(
    made: Made,
    submission: Submission,
    read_blob: Callable[[str], Iterator[bytes]],
    checker: PictureChecker,
    counting: Counting | None,
    progress: Progress,
) -> None:
    """Fills in `made`.

    Args:
        made: empty.
        submission: what was submitted.
        read_blob: a blob's bytes by digest; raises NotFound.
        checker: decodes pictures.
        counting: counts tokens; None: nobody does.
        progress: is told how far the work is; raises when it should end.

    Raises:
        InvalidArgument: the manifest is malformed.
        NotFound: a row file or the manifest is no blob of the tenant.
        ResourceExhausted: a bound on lines or rows is exceeded.
    """

    def manifest_pieces() -> Iterable[bytes]:
        return read_blob(submission.picture_manifest) if submission.picture_manifest else ()

    manifest = PictureManifest(manifest_pieces())
    intake = RowIntake(
        manifest,
        made.pictures,
        made.rows,
        made.findings,
        made.inline_folder,
        submission.default_prompt,
        progress.entered(Phase.READING_ROWS),
    )
    files = [intake.read(index, file.path, read_blob(file.digest)) for index, file in enumerate(submission.row_files)]
    submitted, unused = intake.submitted, manifest.unnamed()
    del intake, manifest  # a million paths are the largest thing here, and of no more use
    told = progress.entered(Phase.CHECKING_PICTURES, len(made.pictures))
    checked = checker.check(made.pictures.digests(), made.inline_folder)
    for done, (index, facts) in enumerate(checked, 1):
        made.pictures.note(index, facts)
        told(done)
    acceptance = Acceptance(made.rows, made.pictures, made.findings, files, counting)
    made.accepted = acceptance.run(
        [file.split for file in submission.row_files],
        submission.fractions,
        progress.entered(Phase.COUNTING_TOKENS, len(made.rows)),
    )
    acceptance.warn(made.accepted, lambda entries: entry_paths(manifest_pieces(), entries))
    for path in unused:
        made.findings.add(len(files), Finding("PICTURE_UNUSED", path, 0, "", ""))
    made.splits = _splits(made.accepted, counting)
    made.digest = _digest(made.accepted)
    made.report = _report(made, submitted, counting)
    made.report.row_files = files


def _splits(accepted: AcceptedRows, counting: Counting | None) -> list[SplitSummary]:
    summaries = []
    ids = np.frombuffer(accepted.split_ids, np.uint16) if accepted.split_ids else np.empty(0, np.uint16)
    for split, split_id in sorted(accepted.splits.items()):
        chosen = ids == split_id
        totals = accepted.tokens.totals(chosen.tolist()) if counting else None
        summaries.append(SplitSummary(split, int(chosen.sum()), totals))
    return summaries


def _digest(accepted: AcceptedRows) -> str:
    hasher, names = DatasetVersionHasher(), list(accepted.splits)
    for index, split_id in enumerate(accepted.split_ids):
        hasher.add(names[split_id], accepted.digests[32 * index : 32 * index + 32].hex())
    return hasher.hexdigest()


def _report(made: Made, submitted: int, counting: Counting | None) -> Report:
    report = Report(
        submitted_rows=submitted,
        accepted_rows=len(made.accepted),
        refused_rows=submitted - len(made.accepted),
        finding_counts=made.findings.counts(),
    )
    if counting:
        report.model, report.contract_digest = counting.model, counting.contract_digest
        report.length_histogram = made.accepted.tokens.histogram()
        train = next((each.tokens for each in made.splits if each.split == "train"), None)
        report.train_tokens_per_epoch = train.visual + train.prompt + train.supervised if train else 0
    return report
