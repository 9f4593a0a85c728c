"""From the domain's values to the contract's messages."""

from google.protobuf.timestamp_pb2 import Timestamp

from veneer.dataset.v1 import dataset_pb2
from veneer_dataset.domain.datasets import Dataset
from veneer_dataset.domain.findings import Finding
from veneer_dataset.domain.progress import Position
from veneer_dataset.domain.report import Report, TokenTotals
from veneer_dataset.domain.versions import DatasetVersion, Hold


def version_name(dataset_id: str, digest: str) -> str:
    """The name of a version."""
    return f"datasets/{dataset_id}/versions/{digest}"


def dataset_message(dataset: Dataset) -> dataset_pb2.Dataset:
    """A dataset."""
    message = dataset_pb2.Dataset(
        name=f"datasets/{dataset.dataset_id}",
        uid=dataset.uid,
        display_name=dataset.display_name,
        default_prompt=dataset.default_prompt,
        labels=dict(dataset.labels),
        version_count=dataset.version_count,
        etag=dataset.etag,
    )
    if dataset.latest_version:
        message.latest_version = version_name(dataset.dataset_id, dataset.latest_version)
    message.create_time.FromDatetime(dataset.created)
    message.update_time.FromDatetime(dataset.updated)
    return message


def version_message(version: DatasetVersion) -> dataset_pb2.DatasetVersion:
    """A version with its report."""
    message = dataset_pb2.DatasetVersion(
        name=version_name(version.dataset_id, version.digest),
        digest=version.digest,
        canonicaliser_version=version.canonicaliser_version,
        report=_report(version.report),
        labels=dict(version.labels),
        picture_size_bytes=version.picture_size_bytes,
        picture_count=version.picture_count,
        hold_count=version.hold_count,
    )
    for split in version.splits:
        added = message.splits.add(split=split.split, row_count=split.row_count)
        if split.tokens is not None:
            added.tokens.CopyFrom(_totals(split.tokens))
    message.create_time.FromDatetime(version.created)
    return message


def finding_message(finding: Finding) -> dataset_pb2.Finding:
    """A finding, with what its code says."""
    kind = finding.kind
    return dataset_pb2.Finding(
        code=finding.code,
        severity=dataset_pb2.Severity.ValueType(kind.severity),
        path=finding.path,
        line=finding.line,
        json_path=finding.json_path,
        found=finding.found,
        expected=kind.expected,
        remedy=kind.remedy,
    )


def progress_message(position: Position) -> dataset_pb2.VersionProgress:
    """How far the making of a version is."""
    message = dataset_pb2.VersionProgress(
        phase=dataset_pb2.Phase.ValueType(position.phase), done=position.done, total=position.total
    )
    if position.remaining_s is not None:
        message.remaining.FromMilliseconds(round(position.remaining_s * 1000))
    return message


def hold_message(name: str, hold: Hold) -> dataset_pb2.Hold:
    """A hold on the version of that name."""
    expires = Timestamp()
    expires.FromDatetime(hold.expires)
    return dataset_pb2.Hold(dataset_version=name, holder=hold.holder, expire_time=expires)


def _report(report: Report) -> dataset_pb2.Report:
    return dataset_pb2.Report(
        submitted_rows=report.submitted_rows,
        accepted_rows=report.accepted_rows,
        refused_rows=report.refused_rows,
        row_files=[
            dataset_pb2.RowFileReport(
                path=each.path,
                dialect=dataset_pb2.Dialect.ValueType(each.dialect),
                submitted_rows=each.submitted_rows,
                accepted_rows=each.accepted_rows,
            )
            for each in report.row_files
        ],
        finding_counts=[
            dataset_pb2.FindingCount(
                code=each.code, severity=dataset_pb2.Severity.ValueType(each.severity), count=each.count
            )
            for each in report.finding_counts
        ],
        model=report.model,
        contract_digest=report.contract_digest,
        length_histogram=[
            dataset_pb2.LengthBucket(at_least_tokens=least, row_count=rows) for least, rows in report.length_histogram
        ],
        train_tokens_per_epoch=report.train_tokens_per_epoch,
    )


def _totals(totals: TokenTotals) -> dataset_pb2.TokenTotals:
    return dataset_pb2.TokenTotals(
        visual=totals.visual,
        prompt=totals.prompt,
        supervised=totals.supervised,
        longest_row=totals.longest_row,
    )
