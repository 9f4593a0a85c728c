"""An export from the adapter's folder to a checked model. It reads from top to bottom."""

from __future__ import annotations

import gc
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import torch

from veneer.trainer.v1 import export_pb2, model_pb2
from veneer_digests import DigestError, adapter_digest, graphs_digest, model_digest, tensor_digests
from veneer_processing import PixelBounds, ProcessingContract, Processor
from veneer_trainer.worker.exporting.answering import Answering, GraphAnswering, TorchAnswering
from veneer_trainer.worker.exporting.comparison import Comparison, inequalities, losses
from veneer_trainer.worker.exporting.prompts import prompts
from veneer_trainer.worker.folders import described
from veneer_trainer.worker.loop.link import Link
from veneer_trainer.worker.loop.run import CONTRACT_FILE
from veneer_trainer.worker.messages import Exported, ExportTask, ShareDone
from veneer_trainer.worker.refusal import Refused
from veneer_vlm import peft_folder
from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import AdapterError
from veneer_vlm.graphs import is_graphs
from veneer_vlm.lora import Adapter
from veneer_vlm.merge import merge, merged_tensors, write_config, write_surroundings
from veneer_vlm.weights import load

_log = structlog.get_logger(__name__)
_WRITTEN, _REFERENCE = 0.2, 0.6  # shares of the work


def export(link: Link, task: ExportTask) -> None:
    """Does the task of this process, and tells the worker what it made.

    Raises:
        Refused: the adapter is damaged, or the exported model is not equal and nobody forced it.
        VeneerError, RefusedError, ProcessingError: base, adapter or data do not fit one another.
    """
    order = export_pb2.Export.FromString(task.export)
    spec, folder, base = order.spec, Path(task.folder), Path(task.model_directory)
    torch.set_num_threads(task.threads)
    dtype = model_pb2.Dtype.Name(spec.dtype).removeprefix("DTYPE_").lower()
    form = export_pb2.ExportFormat.Name(spec.format).removeprefix("EXPORT_FORMAT_").lower()

    adapter, contract = _adapter(Path(task.adapter_folder), base, order.adapter_digest)
    processor = Processor.load(base, task.model_digest).under(contract)
    target = folder / "export"
    bounds = PixelBounds(contract.min_pixels, contract.max_pixels)
    open_export = write_form(form, dtype, base, adapter, bounds, target, task.threads)
    link.send(ShareDone(_WRITTEN))

    asked = prompts(link, task, order, processor)
    if not asked:
        raise Refused("NO_ROWS", f"split {spec.check_split} of {order.dataset_version} has no rows")
    config = ModelConfig.from_directory(base)

    def asking(done_before: float, share: float) -> Comparison:
        def tell(done: int) -> None:
            link.send(ShareDone(done_before + share * done / len(asked)))

        stop_ids = {processor.special.im_end, *_end_ids(target)}
        return Comparison(asked, processor, stop_ids, config.image_token_id, folder, tell)

    reference = asking(_WRITTEN, _REFERENCE - _WRITTEN).reference(TorchAnswering(load(base), adapter))
    gc.collect()  # the base, before another model takes its place
    comparison = asking(_REFERENCE, 0.99 - _REFERENCE)
    measured = comparison.report(reference, comparison.export(open_export(), reference))
    measured |= {
        "threads": task.threads,
        "machine": platform.machine(),
        "torch": str(torch.__version__),
        "check_data": order.dataset_version or "drawn",
    }
    problems = _problems(form, dtype, measured, order)
    measured["problems"] = problems
    _insist(form, dtype, problems, force=spec.force)
    _log.info("exported", work=order.name, **{key: measured[key] for key in ("prompts", "answers_identical")})
    link.send(Exported(str(target), _digest(target), json.dumps(measured).encode()))


def _adapter(folder: Path, base: Path, digest: str) -> tuple[Adapter, ProcessingContract]:
    """The version, held against its digest."""
    try:
        contract = ProcessingContract.from_dict(json.loads((folder / CONTRACT_FILE).read_bytes()))
        config = json.loads((folder / peft_folder.CONFIG_FILE).read_bytes())
        found = adapter_digest(tensor_digests(folder / peft_folder.TENSOR_FILE), config, contract.digest)
    except (OSError, ValueError, DigestError) as error:
        raise Refused("ADAPTER_DAMAGED", f"the version's folder cannot be read: {error}", transient=True) from error
    if found != digest:
        raise Refused("ADAPTER_DAMAGED", f"the version has digest {found}, not {digest}", transient=True)
    try:
        return peft_folder.read(folder, ModelConfig.from_directory(base)), contract
    except AdapterError as error:
        raise Refused("ADAPTER_UNFIT", str(error)) from error


def write_form(
    form: str, dtype: str, base: Path, adapter: Adapter, bounds: PixelBounds, target: Path, threads: int
) -> Callable[[], Answering]:
    """Writes the model; returns what opens it again as it was written."""
    if form == "merged":
        torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        merge(base, adapter, bounds, torch_dtype, target)
        return lambda: TorchAnswering(load(target, torch_dtype))
    _write_graphs(form, dtype, base, adapter, target)
    write_surroundings(base, target, bounds)
    write_config(base, target, torch.float32)
    return lambda: GraphAnswering(target, threads)


def _write_graphs(form: str, dtype: str, base: Path, adapter: Adapter, target: Path) -> None:
    try:
        from veneer_vlm import onnx_graph
    except ModuleNotFoundError as error:
        text = f"{error.name} is not installed on this worker: pip install 'veneer[graphs]'"
        raise Refused("RUNTIME_MISSING", text) from error
    precisions: dict[tuple[str, str], onnx_graph.Precision] = {
        ("onnx", "float32"): "float32",
        ("onnx", "int8"): "int8-blocks",
        ("openvino", "float32"): "float32",
        ("openvino", "int8"): "int8-columns",
    }
    if (form, dtype) not in precisions:
        raise Refused("FORMAT_UNSUPPORTED", f"this worker does not make {form} of {dtype}")
    target.mkdir()
    written = target if form == "onnx" else target.with_name("onnx")
    written.mkdir(exist_ok=True)
    config, tensors = ModelConfig.from_directory(base), merged_tensors(base, adapter, torch.float32)
    onnx_graph.write(config, tensors, precisions[form, dtype], written)
    if form == "openvino":
        import openvino

        for stem in ("vision", "decoder"):
            model = openvino.Core().read_model(written / f"{stem}.onnx")
            openvino.save_model(model, target / f"{stem}.xml", compress_to_fp16=False)
            del model  # it maps what is removed now
        shutil.rmtree(written)


def _digest(folder: Path) -> str:
    if is_graphs(folder):
        return graphs_digest({file.path: file.digest for file in described(folder)})
    return model_digest(folder)


def _problems(form: str, dtype: str, measured: dict[str, Any], order: export_pb2.Export) -> list[str]:
    if (form, dtype) == ("merged", "float32"):
        return inequalities(measured)
    if not measured["metrics"]:
        return [f"{order.spec.adapter_version} has no data here to measure {form} of {dtype} on"]
    return losses(measured)


def _insist(form: str, dtype: str, problems: list[str], *, force: bool) -> None:
    """Refuses an export that is not equal enough, unless it is to be kept all the same."""
    if force or not problems:
        return
    text = f"{'; '.join(problems)}; force keeps it nevertheless"
    if (form, dtype) == ("merged", "float32"):
        raise Refused("EXPORT_DIFFERS", text)
    raise Refused("METRIC_FELL", text)


def _end_ids(directory: Path) -> list[int]:
    path = directory / "generation_config.json"
    found = json.loads(path.read_bytes()).get("eos_token_id", []) if path.exists() else []
    return found if isinstance(found, list) else [found]
