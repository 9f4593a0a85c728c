"""Exports between protobuf and the domain."""

from __future__ import annotations

from veneer.trainer.v1 import export_pb2, model_pb2
from veneer_rpc.errors import violations
from veneer_rpc.names import AdapterVersionName
from veneer_trainer.api.job_convert import dtype_from_proto, failure_to_proto, state_to_proto, timestamp
from veneer_trainer.domain.exports import Export, ExportFormat, ExportSpec
from veneer_trainer.domain.lifecycle import State

_FORMATS = {export_pb2.ExportFormat.Value(f"EXPORT_FORMAT_{each.name}"): each for each in ExportFormat}
_GGUF = "llama.cpp's own converter reads a merged export: see docs/export.md"


def spec_from_proto(message: export_pb2.ExportSpec) -> ExportSpec:
    """Reads what to export; bounds are checked by `ExportSpec.check`.

    Raises:
        InvalidArgument: the version's name or the form.
    """
    with violations() as found:
        version = found.attempt(AdapterVersionName.parse, message.adapter_version, "spec.adapter_version")
        form = _FORMATS.get(message.format)
        if message.format == export_pb2.EXPORT_FORMAT_GGUF:
            found.add("spec.format", "FORMAT_UNSUPPORTED", _GGUF)
        elif form is None:
            text = f"must be {', '.join(each.name for each in ExportFormat)}, was {message.format}"
            found.add("spec.format", "UNKNOWN_VALUE", text)
    assert version is not None  # noqa: S101  # or `violations` has raised
    assert form is not None  # noqa: S101  # likewise
    dtype = dtype_from_proto(message.dtype) if message.dtype else ""
    return ExportSpec(version, form, dtype, message.check_split, message.force)


def export_to_proto(export: Export) -> export_pb2.Export:
    """Writes an export; its files only once it has succeeded."""
    work, order, spec, outcome = export.work, export.order, export.spec, export.outcome
    message = export_pb2.Export(
        name=work.ref.name,
        spec=export_pb2.ExportSpec(
            adapter_version=str(spec.adapter_version),
            format=export_pb2.ExportFormat.Value(f"EXPORT_FORMAT_{spec.format.name}"),
            dtype=model_pb2.Dtype.Value(f"DTYPE_{spec.dtype.upper()}"),
            check_split=spec.check_split,
            force=spec.force,
        ),
        state=state_to_proto(work.state),
        progress=1.0 if work.state is State.SUCCEEDED else export.share_done,
        create_time=timestamp(work.created_s),
        model=order.model,
        adapter_digest=order.adapter_digest,
        dataset_version=order.dataset_version,
    )
    if work.state is State.SUCCEEDED:
        message.digest, message.certificate = outcome.digest, outcome.certificate.encode()
        message.files.extend(
            model_pb2.ModelFile(path=file.path, digest=file.digest, size_bytes=file.size_bytes)
            for file in outcome.files
        )
    if work.failure is not None:
        message.failure.CopyFrom(failure_to_proto(work.failure))
    if work.ended_s is not None:
        message.end_time.CopyFrom(timestamp(work.ended_s))
    return message
