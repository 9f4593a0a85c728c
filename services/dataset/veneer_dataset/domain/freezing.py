"""A submission made into a version and kept: what a client's one call sets off, as work that others may join."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from veneer_dataset.domain.blobs import Blobs
from veneer_dataset.domain.findings import Finding
from veneer_dataset.domain.making import Made, Submission, make_version
from veneer_dataset.domain.pictures import Digests
from veneer_dataset.domain.progress import Phase, Progress
from veneer_dataset.domain.tokens import Counting
from veneer_dataset.domain.versions import DatasetVersion
from veneer_dataset.ports import PictureChecker, VersionStore
from veneer_digests import CANONICALISER_VERSION
from veneer_rpc.errors import FailedPrecondition

FIRST_FINDINGS = 100

_ASKED_AT_ONCE = 5_000


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for."""

    tenant: str
    dataset_id: str
    submission: Submission
    counting: Counting | None
    strict: bool
    validate_only: bool
    labels: Mapping[str, str]


@dataclass(slots=True)
class Work:
    """An order under way; closing it drops what it made.

    Attributes:
        progress: how far it is.
        made: report and findings, once the passes are done, also where the version is then refused.
    """

    order: Order
    progress: Progress = field(default_factory=Progress)
    made: Made | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _closing: threading.Lock = field(default_factory=threading.Lock)

    def findings(self) -> Iterator[list[Finding]]:
        """Findings by the hundred: all of them when only validating, else the first hundred."""
        if self.made is None:
            return
        some: list[Finding] = []
        for finding in self.made.findings:
            some.append(finding)
            if len(some) == FIRST_FINDINGS:
                yield some
                some = []
                if not self.order.validate_only:
                    return
        if some:
            yield some

    def hold(self, made: Made) -> None:
        """Keeps what was made until `close`."""
        self.made = self._stack.enter_context(made)

    def close(self) -> None:
        """Deletes the working files."""
        with self._closing:
            self._stack.close()


class Freezer:
    """Makes versions; safe to use from several threads.

    Args:
        blobs: has the submitted files.
        versions: keeps versions.
        checker: gives what checks a tenant's pictures.
        work_folder: for working files, on the file system of uploads.
    """

    def __init__(
        self, blobs: Blobs, versions: VersionStore, checker: Callable[[str], PictureChecker], work_folder: Path
    ) -> None:
        self._blobs = blobs
        self._versions = versions
        self._checker = checker
        self._work_folder = work_folder

    def run(self, work: Work) -> DatasetVersion:
        """Does an order.

        Raises:
            FailedPrecondition: nothing was accepted, or something refused and the order strict.
            Cancelled: the work was told to end.
            VeneerError: as make_version and VersionStore.save.
        """
        with self._blobs.needed():
            return self._run(work)

    def _run(self, work: Work) -> DatasetVersion:
        order = work.order

        def read_blob(digest: str) -> Iterator[bytes]:
            return self._blobs.read(self._blobs.find(order.tenant, [digest])[0])

        work.hold(Made(self._work_folder))
        made = work.made
        assert made is not None  # noqa: S101  # for the type checker
        make_version(made, order.submission, read_blob, self._checker(order.tenant), order.counting, work.progress)
        report = made.report
        if not report.accepted_rows:
            raise FailedPrecondition(
                "NO_ROW_ACCEPTED", f"of {report.submitted_rows} rows none was accepted: see the findings"
            )
        if order.strict and made.findings.has_errors:
            raise FailedPrecondition(
                "ROWS_REFUSED", f"{report.refused_rows} of {report.submitted_rows} rows were refused, strict was set"
            )
        pictures = made.used_pictures()
        if order.validate_only:
            return self._would_be(order, made, pictures)
        work.progress.entered(Phase.WRITING, report.accepted_rows)
        inline = [(each.name, each) for each in made.inline_folder.iterdir() if each.name in pictures]
        self._blobs.add(order.tenant, inline)
        return self._versions.save(order.tenant, order.dataset_id, made, order.labels, pictures)

    def _would_be(self, order: Order, made: Made, pictures: Digests) -> DatasetVersion:
        size_bytes = 0
        for start in range(0, len(pictures), _ASKED_AT_ONCE):
            some = pictures[start : start + _ASKED_AT_ONCE]
            known = self._blobs.known(order.tenant, some)
            size_bytes += sum(blob.size_bytes for blob in known.values())
            size_bytes += sum((made.inline_folder / each).stat().st_size for each in some if each not in known)
        return DatasetVersion(
            dataset_id=order.dataset_id,
            digest=made.digest,
            canonicaliser_version=CANONICALISER_VERSION,
            splits=tuple(made.splits),
            report=made.report,
            labels=order.labels,
            picture_size_bytes=size_bytes,
            picture_count=len(pictures),
            hold_count=0,
            created=datetime.now(UTC),
        )
