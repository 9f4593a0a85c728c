"""Adapters, versions and what replicas should hold, between protobuf and the domain."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from veneer.trainer.v1 import adapter_pb2, adapter_service_pb2, model_pb2
from veneer_rpc.errors import Violations
from veneer_rpc.names import AdapterVersionName
from veneer_trainer.api.job_convert import contract_to_proto, progress_to_proto, resolved_to_proto, timestamp
from veneer_trainer.api.spec_convert import lora_to_proto, spec_to_proto
from veneer_trainer.domain.adapters import (
    Adapter,
    AdapterVersion,
    AliasMove,
    Lineage,
    RegistryChanges,
    RollbackPolicy,
    ServedAdapter,
    Settings,
    TrafficSplit,
)
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.serving import ServingFigures

_BOUNDS = ("max_error_rate", "max_latency_ratio", "min_judgement")


def adapter_to_proto(adapter: Adapter) -> adapter_pb2.Adapter:
    """Writes an adapter."""
    message = adapter_pb2.Adapter(
        name=str(adapter.name),
        uid=adapter.uid,
        display_name=adapter.display_name or adapter.name.adapter,
        labels=adapter.labels,
        model=str(adapter.model),
        aliases=adapter.aliases,
        preload=adapter.preload,
        latest_version=adapter.latest_version,
        create_time=timestamp(adapter.created_s),
        update_time=timestamp(adapter.updated_s),
        etag=adapter.etag,
    )
    if adapter.traffic_split is not None:
        message.traffic_split.CopyFrom(_split_to_proto(adapter.traffic_split))
    return message


def settings_from_proto(message: adapter_pb2.Adapter) -> Settings:
    """Reads what an owner may set."""
    split = None
    if message.HasField("traffic_split"):
        said = message.traffic_split
        split = TrafficSplit(said.alias, said.share, _policy(said.rollback) if said.HasField("rollback") else None)
    return Settings(message.display_name, dict(message.labels), split, message.preload)


def version_to_proto(version: AdapterVersion, evaluations: Sequence[str] = ()) -> adapter_pb2.AdapterVersion:
    """Writes a version."""
    content = version.content
    message = adapter_pb2.AdapterVersion(
        name=str(version.name),
        digest=version.digest,
        contract=contract_to_proto(content.contract),
        lora=lora_to_proto(content.lora),
        target_modules=content.target_modules,
        size_bytes=content.size_bytes,
        files=files_to_proto(content.files),
        lineage=_lineage_to_proto(version.lineage),
        evaluations=evaluations,
        aliases=version.aliases,
        create_time=timestamp(version.created_s),
    )
    if version.final_progress is not None:
        message.final_progress.CopyFrom(progress_to_proto(version.final_progress))
    return message


def files_to_proto(files: Iterable[StoredFile]) -> list[model_pb2.ModelFile]:
    """Writes files."""
    return [model_pb2.ModelFile(path=file.path, digest=file.digest, size_bytes=file.size_bytes) for file in files]


def move_to_proto(move: AliasMove) -> adapter_pb2.AliasMove:
    """Writes the record of an alias that moved."""
    return adapter_pb2.AliasMove(
        sequence=move.sequence,
        alias=move.alias,
        from_version=move.from_version,
        to_version=move.to_version,
        actor=move.actor,
        reason=move.reason,
        move_time=timestamp(move.moved_s),
    )


def served_from_proto(
    served: Iterable[adapter_service_pb2.ServedAdapter], found: Violations
) -> list[tuple[str, AdapterVersionName, ServingFigures]]:
    """Reads what a replica counted, as (tenant, version, figures), and notes what cannot be."""
    read = []
    for index, each in enumerate(served):
        place = f"served_adapters[{index}]"
        name = found.attempt(AdapterVersionName.parse, each.adapter_version, f"{place}.adapter_version")
        counts = (each.answered, each.failed, each.latency_p95_ms)
        if not all(math.isfinite(count) and count >= 0 for count in counts):
            found.add(place, "OUT_OF_RANGE", f"figures must be 0 or more, were {counts}")
        elif name is not None:
            read.append((each.tenant, name, ServingFigures(*counts)))
    return read


def changes_to_proto(changes: RegistryChanges, snapshot: bool) -> adapter_service_pb2.WatchAdaptersResponse:
    """Writes the whole desired state, or what is new of it."""
    deleted = [] if snapshot else changes.deleted
    return adapter_service_pb2.WatchAdaptersResponse(
        revision=changes.revision,
        snapshot=snapshot,
        adapters=map(_served_to_proto, changes.adapters),
        deleted_adapters=[adapter_pb2.DeletedAdapter(adapter=str(name), tenant=tenant) for tenant, name in deleted],
    )


def _served_to_proto(adapter: ServedAdapter) -> adapter_pb2.ServingAdapter:
    message = adapter_pb2.ServingAdapter(
        adapter=str(adapter.name),
        aliases=[
            adapter_pb2.ServingAlias(alias=each.alias, adapter_version=str(each.version), digest=each.digest)
            for each in adapter.aliases
        ],
        preload=adapter.preload,
        tenant=adapter.tenant,
    )
    if adapter.traffic_split is not None:
        message.traffic_split.CopyFrom(_split_to_proto(adapter.traffic_split))
    return message


def _lineage_to_proto(lineage: Lineage) -> adapter_pb2.Lineage:
    message = adapter_pb2.Lineage(
        code_version=lineage.code_version, initial_adapter_version=lineage.initial_adapter_version
    )
    if lineage.imported is not None:
        message.imported.description = lineage.imported.description
        message.imported.importer = lineage.imported.importer
    else:
        message.training_job = lineage.training_job
    if lineage.spec is not None:
        message.spec.CopyFrom(spec_to_proto(lineage.spec))
    if lineage.resolved is not None:
        message.resolved.CopyFrom(resolved_to_proto(lineage.resolved))
    return message


def _split_to_proto(split: TrafficSplit) -> adapter_pb2.TrafficSplit:
    message = adapter_pb2.TrafficSplit(alias=split.alias, share=split.share)
    if (policy := split.rollback) is not None:
        message.rollback.min_answers = policy.min_answers
        for name in _BOUNDS:
            if (value := getattr(policy, name)) is not None:
                setattr(message.rollback, name, value)
    return message


def _policy(message: adapter_pb2.RollbackPolicy) -> RollbackPolicy:
    bounds = {name: getattr(message, name) for name in _BOUNDS if message.HasField(name)}  # type: ignore[arg-type]  # one of three names
    return RollbackPolicy(**bounds | ({"min_answers": message.min_answers} if message.min_answers else {}))
