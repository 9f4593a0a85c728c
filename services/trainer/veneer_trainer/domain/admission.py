"""What a training job is checked against before it is accepted: its base, its data, and what it would take."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any

from veneer_rpc.errors import FailedPrecondition, ResourceExhausted, Violation, invalid
from veneer_trainer.domain.estimate import estimate
from veneer_trainer.domain.jobs import Estimate
from veneer_trainer.domain.spec import CoTrain, Dtype, OverLength, TrainingSpec
from veneer_trainer.domain.work import Needs
from veneer_trainer.domain.workers import Workers
from veneer_trainer.ports import BaseModel, Datasets, ModelCatalog, Registry, SplitFacts, VersionFacts

_RETRY_S = 60.0
_DEFAULTS = {field.name: field.default for field in fields(TrainingSpec)}


@dataclass(frozen=True, slots=True)
class Admitted:
    """A spec with what admission decided, its estimate, and what a worker must have."""

    spec: TrainingSpec
    estimate: Estimate
    needs: Needs


class Admission:
    """Judges specs.

    Args:
        catalog: the bases.
        datasets: the data; asked over the network.
        registry: the adapters.
        workers: what workers have measured.
    """

    def __init__(self, catalog: ModelCatalog, datasets: Datasets, registry: Registry, workers: Workers) -> None:
        self._catalog = catalog
        self._datasets = datasets
        self._registry = registry
        self._workers = workers

    def judge(self, tenant: str, spec: TrainingSpec) -> Admitted:
        """Returns what a job would take, whether or not it can be accepted.

        Raises:
            InvalidArgument: bounds of the base, target modules or splits; with every violation of a kind.
            NotFound: base, data or initial adapter version.
            FailedPrecondition: the adapter does not fit.
            Unavailable: the dataset service does not answer.
        """
        base = self._catalog.get(spec.model)
        spec = _with_bounds(spec, base)
        self._registry.check_adapter(tenant, spec)
        version = self._datasets.version(tenant, spec.dataset_version)
        spec = _with_splits(spec, version)
        self._check_planned(tenant, spec)
        split = self._counted(spec, version)
        taken = estimate(spec, base, split, self._workers.known())
        if split.longest_row is not None:
            over = _rows_over(spec.max_length, split, version)
            taken = replace(taken, over_length_rows=over)
        dtype = "" if spec.dtype is Dtype.AUTO else spec.dtype.value
        return Admitted(spec, taken, Needs(base.digest, dtype, taken.peak_memory_bytes or 0, _shares(spec)))

    def admit(self, tenant: str, spec: TrainingSpec) -> Admitted:
        """Returns a job that can be accepted.

        Raises:
            VeneerError: as `judge`.
            FailedPrecondition: ROWS_TOO_LONG, with their count and the length that would fit.
            ResourceExhausted: DOES_NOT_FIT, with the figures and what would fit.
        """
        admitted = self.judge(tenant, spec)
        taken = admitted.estimate
        if taken.over_length_rows and spec.over_length is OverLength.REFUSE:
            rows, longest = taken.over_length_rows, taken.longest_row_tokens
            raise FailedPrecondition(
                "ROWS_TOO_LONG",
                f"at least {rows} rows of split {admitted.spec.train_split} are longer than max_length "
                f"{spec.max_length}, the longest has {longest} tokens: set max_length={longest}, or "
                "over_length=SKIP to leave them out",
                metadata={"rows": str(rows), "longest_row_tokens": str(longest)},
            )
        if not taken.fits:
            hint = " or ".join(taken.suggestions) or "nothing small; it needs a larger worker"
            raise ResourceExhausted(
                "DOES_NOT_FIT",
                f"needs {taken.peak_memory_bytes} bytes, worker class {taken.worker_class} offers "
                f"{taken.available_memory_bytes}; what would fit: {hint}",
                metadata={"suggestions": ", ".join(taken.suggestions)},
                retry_after_s=_RETRY_S,
            )
        return admitted

    def _check_planned(self, tenant: str, spec: TrainingSpec) -> None:
        """Looks whether other data that evaluations are planned on is there, with its split."""
        found = []
        for index, planned in enumerate(spec.evaluations):
            if planned.dataset_version in (None, spec.dataset_version):
                continue
            splits = self._datasets.version(tenant, planned.dataset_version).splits
            if planned.split not in splits:
                text = f"{planned.dataset_version} has {', '.join(sorted(splits))}, not {planned.split!r}"
                found.append(Violation(f"spec.evaluations[{index}].split", "SPLIT_UNKNOWN", text))
        if found:
            raise invalid(*found)

    def _counted(self, spec: TrainingSpec, version: VersionFacts) -> SplitFacts:
        """The training split, without token counts that were made by another contract than the job's."""
        split = version.splits[spec.train_split]
        if version.model == str(spec.model) and version.contract_digest == self._contract_digest(spec):
            return split
        return SplitFacts(split.rows)

    def _contract_digest(self, spec: TrainingSpec) -> str:
        return self._catalog.contract(spec.model, spec.max_pixels).digest


def _with_bounds(spec: TrainingSpec, base: BaseModel) -> TrainingSpec:
    """The spec within the base's bounds: a default gives way to them, another value is refused."""
    found, lowered = [], dict[str, Any]()
    for name, limit in (("max_length", base.context_length), ("max_pixels", base.max_pixels)):
        value = getattr(spec, name)
        if value > limit and value == _DEFAULTS[name]:
            lowered[name] = limit
        elif value > limit:
            text = f"must be at most {limit}, the bound of {spec.model}, was {value}"
            found.append(Violation(f"spec.{name}", "OUT_OF_RANGE", text))
    if found:
        raise invalid(*found)
    return replace(spec, **lowered)


def _with_splits(spec: TrainingSpec, version: VersionFacts) -> TrainingSpec:
    """The spec with its default for the validation split filled in."""
    if spec.validation_split is None and "validation" in version.splits:
        spec = replace(spec, validation_split="validation")
    found = []
    wanted = {"train_split": spec.train_split, "validation_split": spec.validation_split}
    same = (each for each in spec.evaluations if each.dataset_version in (None, spec.dataset_version))
    wanted |= {f"evaluations[{index}].split": planned.split for index, planned in enumerate(same)}
    for place, split in wanted.items():
        if split is not None and split not in version.splits:
            text = f"{spec.dataset_version} has {', '.join(sorted(version.splits))}, not {split!r}"
            found.append(Violation(f"spec.{place}", "SPLIT_UNKNOWN", text))
    if found:
        raise invalid(*found)
    return spec


def _rows_over(max_length: int, split: SplitFacts, version: VersionFacts) -> int:
    """At least so many rows are too long.

    The histogram is over all splits and its buckets are wide: rows of buckets that lie above the bound count,
    as far as they can be this split's; the longest row counts in any case.
    """
    if (split.longest_row or 0) <= max_length:
        return 0
    others = sum(facts.rows for facts in version.splits.values()) - split.rows
    above = sum(rows for at_least, rows in version.histogram if at_least > max_length)
    return max(1, above - others)


def _shares(spec: TrainingSpec) -> str:
    """What jobs must have in common, beside base and dtype, to share a process, its rows and its passes."""
    if spec.co_train is not CoTrain.ALLOWED:
        return ""
    alike = [str(spec.max_pixels), *sorted(spec.lora.target_modules)]
    return hashlib.sha256(",".join(alike).encode()).hexdigest()[:16]
