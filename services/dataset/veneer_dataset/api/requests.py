"""From the contract's requests to the domain's values; every wrong field of a request is told at once."""

import math
import re
from dataclasses import dataclass

from veneer.dataset.v1 import dataset_pb2, dataset_service_pb2
from veneer_dataset.domain.datasets import check_labels
from veneer_dataset.domain.draft import split_name
from veneer_dataset.domain.examples import PictureForm, Shuffle
from veneer_dataset.domain.findings import Refusal
from veneer_dataset.domain.intake import RowFile
from veneer_dataset.domain.picture_paths import safe_path
from veneer_dataset.domain.splits import Fractions, GroupKey
from veneer_rpc.errors import Violation, Violations, invalid, violations
from veneer_rpc.names import DatasetName, DatasetVersionName, ModelName, ResourceName

MAX_ROW_FILES = 1_000
MAX_SEED = 2**63 - 1

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHARES_TOLERANCE = 1e-9
_GROUP_KEYS = {
    dataset_pb2.GROUP_KEY_UNSPECIFIED: GroupKey.PICTURES,
    dataset_pb2.GROUP_KEY_PICTURES: GroupKey.PICTURES,
    dataset_pb2.GROUP_KEY_FIELD: GroupKey.FIELD,
    dataset_pb2.GROUP_KEY_NONE: GroupKey.NONE,
}
_FORMS = {
    dataset_service_pb2.PICTURE_FORM_UNSPECIFIED: PictureForm.DIGEST,
    dataset_service_pb2.PICTURE_FORM_DIGEST: PictureForm.DIGEST,
    dataset_service_pb2.PICTURE_FORM_ORIGINAL: PictureForm.ORIGINAL,
    dataset_service_pb2.PICTURE_FORM_RESIZED: PictureForm.RESIZED,
}


@dataclass(frozen=True)
class VersionPrefix(ResourceName):
    """The name of a version, whose digest may be cut short."""

    type = "veneer/DatasetVersion"
    pattern = "datasets/{dataset}/versions/{version}"
    rules = {  # noqa: RUF012  # ClassVar, declared in the base
        "version": (re.compile(r"[0-9a-f]{12,64}"), "12 to 64 lower-case hex digits")
    }
    dataset: str
    version: str


@dataclass(frozen=True, slots=True)
class VersionRequest:
    """A CreateDatasetVersionRequest, checked."""

    dataset: DatasetName
    row_files: tuple[RowFile, ...]
    fractions: Fractions | None
    model: ModelName | None


@dataclass(frozen=True, slots=True)
class ExamplesRequest:
    """A ReadExamplesRequest, checked."""

    version: DatasetVersionName
    form: PictureForm
    shuffle: Shuffle | None
    model: ModelName | None


def version_request(request: dataset_service_pb2.CreateDatasetVersionRequest) -> VersionRequest:
    """Checks what a version is to be made of.

    Raises:
        InvalidArgument: with every wrong field.
    """
    with violations() as found:
        dataset = found.attempt(DatasetName.parse, request.parent, "parent")
        model = found.attempt(ModelName.parse, request.model, "model") if request.model else None
        if not 1 <= len(request.row_files) <= MAX_ROW_FILES:
            found.add("row_files", "OUT_OF_RANGE", f"must be 1 to {MAX_ROW_FILES}, there are {len(request.row_files)}")
        files = [_row_file(each, f"row_files[{index}]", found) for index, each in enumerate(request.row_files)]
        if len({file.path for file in files}) < len(files):
            found.add("row_files", "PATH_TWICE", "each path must be there once: findings name it")
        if request.picture_manifest and not _DIGEST.fullmatch(request.picture_manifest):
            found.add("picture_manifest", "INVALID_DIGEST", "must be 64 lower-case hex digits")
        if request.max_pixels < 0:
            found.add("max_pixels", "OUT_OF_RANGE", f"must be 0 or more, was {request.max_pixels}")
        fractions = _fractions(request.split_policy, found)
        check_labels(request.labels, found, "labels")
    if dataset is None:
        raise AssertionError("a missing name is a violation")
    return VersionRequest(dataset, tuple(files), fractions, model)


def examples_request(request: dataset_service_pb2.ReadExamplesRequest) -> ExamplesRequest:
    """Checks what is to be read.

    Raises:
        InvalidArgument: with every wrong field.
    """
    with violations() as found:
        version = found.attempt(DatasetVersionName.parse, request.dataset_version, "dataset_version")
        form = _FORMS.get(request.picture_form)
        if form is None:
            found.add("picture_form", "UNKNOWN", f"must be a known form, was {request.picture_form}")
        model = None
        if form is PictureForm.RESIZED:
            model = found.attempt(ModelName.parse, request.model, "model")
        for field, value, most in (
            ("offset", request.offset, MAX_SEED),
            ("limit", request.limit, MAX_SEED),
            ("max_pixels", request.max_pixels, MAX_SEED),
            ("shuffle.seed", request.shuffle.seed, MAX_SEED),
            ("shuffle.epoch", request.shuffle.epoch, MAX_SEED),
        ):
            if not 0 <= value <= most:
                found.add(field, "OUT_OF_RANGE", f"must be 0 or more, was {value}")
        if not request.split:
            found.add("split", "MISSING", "must name a split")
    if version is None or form is None:
        raise AssertionError("what is missing is a violation")
    shuffle = Shuffle(request.shuffle.seed, request.shuffle.epoch) if request.HasField("shuffle") else None
    return ExamplesRequest(version, form, shuffle, model)


def check_digests(digests: "list[str]", most: int) -> None:
    """Raises InvalidArgument unless these are 1 to so many digests."""
    if not 1 <= len(digests) <= most:
        raise invalid(Violation("digests", "OUT_OF_RANGE", f"must be 1 to {most}, there are {len(digests)}"))
    with violations() as found:
        for index, digest in enumerate(digests):
            if not _DIGEST.fullmatch(digest):
                found.add(
                    f"digests[{index}]", "INVALID_DIGEST", f"must be 64 lower-case hex digits, was {digest[:80]!r}"
                )


def _row_file(file: dataset_service_pb2.RowFile, field: str, found: Violations) -> RowFile:
    path = file.path
    try:
        path = safe_path(path, "")
    except Refusal as refusal:
        found.add(f"{field}.path", "INVALID_PATH", f"must be {refusal.expected}, was {refusal.found!r}")
    if not _DIGEST.fullmatch(file.digest):
        found.add(f"{field}.digest", "INVALID_DIGEST", f"must be 64 lower-case hex digits, was {file.digest[:80]!r}")
    if file.split:
        _check_split(file.split, f"{field}.split", found)
    return RowFile(path, file.digest, file.split)


def _fractions(policy: dataset_pb2.SplitPolicy, found: Violations) -> Fractions | None:
    if policy.WhichOneof("policy") != "fractions":
        return None
    field, shares = "split_policy.fractions.fractions", dict(policy.fractions.fractions)
    for split, share in shares.items():
        _check_split(split, field, found)
        if not (math.isfinite(share) and share > 0):
            found.add(f"{field}[{split[:40]}]", "OUT_OF_RANGE", f"must be greater than 0, was {share}")
    total = math.fsum(shares.values())
    if not abs(total - 1) <= _SHARES_TOLERANCE:
        found.add(field, "OUT_OF_RANGE", f"must sum up to 1, sum up to {total:.12g}")
    group_key = _GROUP_KEYS.get(policy.fractions.group_key)
    if group_key is None:
        found.add("split_policy.fractions.group_key", "UNKNOWN", f"was {policy.fractions.group_key}")
        return None
    return Fractions(shares, group_key, policy.fractions.stratified)


def _check_split(split: str, field: str, found: Violations) -> None:
    try:
        split_name(split, "")
    except Refusal as refusal:
        found.add(field, "INVALID_SPLIT", f"must be {refusal.expected}, was {refusal.found!r}")
